"""Results of benchmarks: rows and their file, tables, comparison, goals, the HTML page."""
