"""`scail2-rt bench`: how fast, how close to the hardware's ceilings, how exact, and against whom, in one run."""
