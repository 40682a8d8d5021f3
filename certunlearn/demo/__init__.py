"""The demonstration: a small Flax network on real images forgets a tenth of its training data."""
