"""How much memory a program took, for tests that start one."""

import subprocess
import sys

import pytest

# Not getrusage's ru_maxrss: on Linux a new program inherits the peak of the one that started it.
PEAK = '''
def peak():
    """Kilobytes."""
    import pathlib, re
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
'''


def run(script, *arguments):
    """What a script prints that may call `peak()`."""
    if sys.platform != "linux":
        pytest.skip("peak memory is read from /proc")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,  # 20 seconds were measured; a slow machine under load is no fault
    )
    return done.stdout
