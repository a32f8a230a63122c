"""Colour-coded masks: classes, statistics, checks, repair, conversion, previews, and the framing of characters."""
