"""Planning: the memory, FLOPs and traffic of a layout of ranks, by arithmetic."""
