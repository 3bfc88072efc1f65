"""MLflow runs, the journal of points, lineage."""
