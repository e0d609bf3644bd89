"""`motley submit`: submitting runs, comparisons and tokenization as jobs."""
