"""Stage `pretrain`: pre-training without labels."""
