"""Stage `intermediate`: fine-tuning on the larger label set."""

from vitpipe.stages.train_classifier import run as run
