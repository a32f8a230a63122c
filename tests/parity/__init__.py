"""Comparison of the golden fixtures with the program's code."""
