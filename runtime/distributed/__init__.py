"""One generation on several GPUs: starting the ranks, communication, and the work of each rank. Read `team` first."""
