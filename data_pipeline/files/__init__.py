"""The ground floor: configuration files, atomic writes, locks and progress."""
