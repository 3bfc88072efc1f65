"""Every measurement that `vitpipe benchmark` and `vitpipe cost` make."""
