"""The networks cut into engine stages: definition of a stage, its layers, one file per network."""
