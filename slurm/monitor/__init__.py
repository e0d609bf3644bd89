"""What runs are doing: `motley status`, `logs` and `cancel`."""
