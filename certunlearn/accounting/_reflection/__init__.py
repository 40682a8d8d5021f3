"""Reflection coupling: its recursion, tables and kernel."""
