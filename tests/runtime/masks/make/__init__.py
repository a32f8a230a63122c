"""Tests of `runtime.masks.make`."""
