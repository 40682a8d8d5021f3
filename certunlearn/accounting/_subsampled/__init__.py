"""Poisson-sampled Gaussian steps: tables, Renyi divergences."""
