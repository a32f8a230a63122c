"""The drawn world: figures, motions, drawing, and cases whose correct animation is known."""
