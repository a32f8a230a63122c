"""`scail2-rt bench quality`: generates drawn cases and compares them with the known correct output."""
