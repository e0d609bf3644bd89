"""How a step is spread over ranks. Knows towers as names and slices, not what they mean."""
