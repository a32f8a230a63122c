"""The command line: `main` first; options, help sections, and what commands print."""
