"""Private helpers of every room: checks, norms, draws, files."""
