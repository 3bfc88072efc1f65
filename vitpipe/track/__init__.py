"""Tracking: a stage records events in a journal on disk; an uploader sends each to MLflow exactly once."""
