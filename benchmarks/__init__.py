"""What was measured, and how. A regular package: a library's own `benchmarks` must not hide it."""
