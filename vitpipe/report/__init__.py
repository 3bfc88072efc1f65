"""Comparison of a run with published results: verdicts, tables, figures, the report page."""
