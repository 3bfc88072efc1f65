"""What every room may rely on: errors, files, artifacts, the graph, the logger, seeds."""
