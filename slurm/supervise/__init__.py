"""The supervisor of a job on its first node, from the check of the nodes to the decision to restart."""
