"""Speed, memory and quality measurements."""
