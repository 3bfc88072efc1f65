"""Stage `evaluate`: accuracy, cost and throughput of the result."""
