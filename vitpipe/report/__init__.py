"""A run beside the published row: comparison, tables, figures, page."""
