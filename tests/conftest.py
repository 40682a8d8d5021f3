"""What all tests share: compiled functions, kept for the time of one run of tests.

Most of a test's time is XLA compiling small functions. Tests build the same ones again and again,
so a run of tests keeps what it has compiled in a folder of its own, empty at its start. Its workers
share the folder: JAX's names for what it compiles differ from folder to folder. Programs that tests
start get it by `process_helpers.kept_programs`.
"""

import os
import tempfile

import jax

# Scripts for processes of their own, with several devices.
collect_ignore = ["sharding_script.py", "devices_script.py", "processes_script.py"]

# Made by the process that starts the workers, which ends last.
_FOLDER = "CERTUNLEARN_TESTS_COMPILED"
if "PYTEST_XDIST_WORKER" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="certunlearn-tests-", ignore_cleanup_errors=True)
    os.environ[_FOLDER] = _COMPILED.name
jax.config.update("jax_compilation_cache_dir", os.environ[_FOLDER])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
