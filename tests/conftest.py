"""What all tests share: compiled functions, kept for the time of one test process.

Most of a test's time is XLA compiling small functions. Tests build the same ones again and again,
so a process of tests keeps what it has compiled in a folder of its own, empty at its start.
Programs that tests start do not get it: some of them tell XLA to compile otherwise.
"""

import tempfile

import jax

# Scripts for processes of their own, with several devices.
collect_ignore = ["sharding_script.py", "devices_script.py", "processes_script.py"]

_COMPILED = tempfile.TemporaryDirectory(prefix="certunlearn-tests-", ignore_cleanup_errors=True)
jax.config.update("jax_compilation_cache_dir", _COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
