"""Tests of the room where masks are made."""
