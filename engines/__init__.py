"""Compiled stages: manifest, build, and the executors that run them."""
