"""The networks cut into engine stages: what a stage is, its layers, one file per network."""
