"""Benchmark results: rows and their JSON file, tables, comparison, goals, HTML page."""
