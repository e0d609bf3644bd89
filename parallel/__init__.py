"""Spreading a training step over ranks. Towers are only names and slices here."""
