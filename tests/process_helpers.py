"""What tests share that start programs of their own."""


def kept_programs(folder):
    """The environment in which JAX keeps in `folder` what it compiles, for the programs after."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
