"""`motley status`, `logs` and `cancel`: watching and ending submitted runs."""
