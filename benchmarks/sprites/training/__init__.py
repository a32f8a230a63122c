"""Training of the sprite checkpoint. Not part of the wheel; run it from a clone of the repository."""
