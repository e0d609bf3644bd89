"""Which run goes on from which: a run is extended, goes back to an earlier checkpoint, or has branches."""
