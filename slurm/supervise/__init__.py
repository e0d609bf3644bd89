"""What supervises a job on its first node, from the check of its nodes to what comes next."""
