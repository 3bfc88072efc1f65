"""What it is worth: accuracy, neighbours, linear probe, cost, throughput."""
