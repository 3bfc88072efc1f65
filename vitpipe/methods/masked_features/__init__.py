"""Masked pre-training on the features of a frozen teacher (iTPN with CLIP)."""
