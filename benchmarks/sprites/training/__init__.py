"""How the sprite checkpoint is trained. Not part of the wheel: run it from a clone."""
