"""Folders of weights: export, import, and warm starts."""
