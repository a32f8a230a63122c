"""`scail2-rt bench`: measures speed, share of the hardware's ceilings, error and baselines, in one run."""
