"""The acceptance test of an engine folder."""
