"""Colour-coded masks: meaning, statistics, rules, mending, pictures; and how they frame a character."""
