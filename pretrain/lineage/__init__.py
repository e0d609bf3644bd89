"""Runs go on from others: a run is extended, goes back to an earlier checkpoint, or has branches."""
