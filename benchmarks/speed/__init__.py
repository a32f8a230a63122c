"""What `scail2-rt bench` measures: one file per section, and the models, baselines and timing that sections share."""
