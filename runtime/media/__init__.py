"""Pictures, videos and sound: reading and writing."""
