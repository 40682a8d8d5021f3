"""The package's version, the one place where it stands: pyproject.toml and the package read it."""

__version__ = "0.1.0"
