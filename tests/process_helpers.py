"""What tests share that start programs of their own."""

import jax


def kept_programs():
    """The environment in which JAX keeps what a program compiles with what the tests compile.

    Not for programs of which the memory is measured: compiling takes most of it.
    """
    return {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
