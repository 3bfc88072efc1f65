"""Tracking: what a run reports goes to a journal on disk first, and from there to MLflow, exactly once."""
