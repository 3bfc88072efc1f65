"""PaCa-ViT: patches attend to learnt clusters of patches."""
