"""The measurements of `vitpipe benchmark` and `vitpipe cost`."""
