"""One generation on several GPUs: the processes, how they talk, and what each of them does. Read `team` first."""
