"""What a run trained on: which documents, in which step, how often."""
