"""T2T-ViT, whose tokens are made of overlapping windows of tokens, twice."""
