"""Comparisons of runs that were made elsewhere, from their logs."""
