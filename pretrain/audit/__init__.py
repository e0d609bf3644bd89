"""An audit tells what a run trained on: which documents, in which step, how often."""
