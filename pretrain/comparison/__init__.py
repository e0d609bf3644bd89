"""Comparisons: from a file of arms and seeds to runs, statistics and verdicts."""
