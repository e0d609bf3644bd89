"""The decoder, its configuration and its accounting."""
