"""HiViT and iTPN: the hierarchical backbone, its masked pre-training, the pyramid, official checkpoints."""
