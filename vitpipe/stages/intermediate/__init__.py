"""Stage `intermediate`: fine-tuning on the larger label set."""
