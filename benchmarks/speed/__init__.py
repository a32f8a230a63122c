"""The measurements of `scail2-rt bench`: one file per section, and shared models, baselines and timing."""
