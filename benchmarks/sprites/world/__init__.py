"""The drawn world: figures, motions, drawing, and cases whose right animation is known."""
