"""Images, videos and audio: reading and writing."""
