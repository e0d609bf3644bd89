"""Benchmarks: commands that compare Motley with the usual alternatives."""
