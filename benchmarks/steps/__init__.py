"""What the benchmarks of speed, memory and scaling share: networks, ways to take a step, timing."""
