"""How runs, comparisons and tokenization become jobs."""
