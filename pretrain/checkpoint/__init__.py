"""Checkpoints: saved while training goes on, verified, and read by any layout of ranks."""
