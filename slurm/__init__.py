"""Slurm: submitting runs from a login node, supervising their jobs and showing their state. No torch."""
