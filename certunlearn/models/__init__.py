"""Losses with known constants, of linear models and of networks linearised at public weights."""
