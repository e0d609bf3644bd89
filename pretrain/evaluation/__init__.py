"""Held-out losses, and pictures of which tokens run."""
