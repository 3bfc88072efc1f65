"""Stage `finetune`: fine-tuning on the target classes."""

from vitpipe.stages.train_classifier import run as run
