"""The report of a comparison: page, figures, tables and files."""
