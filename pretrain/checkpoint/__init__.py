"""Checkpoints: they are saved while training continues, verified, and read by any layout of ranks."""
