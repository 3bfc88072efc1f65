"""Stage `finetune`: fine-tuning on the target classes."""
