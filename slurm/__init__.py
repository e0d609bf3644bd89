"""Submitting runs to Slurm, from a login node: imports no torch."""
