"""Exact sums over examples: what exact unlearning subtracts from."""
