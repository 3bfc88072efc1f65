"""Stage `prepare`: raw images to verified shards."""
