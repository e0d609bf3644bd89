"""Benchmarks: commands that measure against what a user would pick instead."""
