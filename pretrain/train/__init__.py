"""Training: one rank from its config to its exit code, the loop, and what a step measures."""
