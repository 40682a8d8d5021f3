"""Private helpers that all subpackages use: checks, norms, draws, files."""
