"""`scail2-rt bench quality`: drawn cases animated, judged against the known answer."""
