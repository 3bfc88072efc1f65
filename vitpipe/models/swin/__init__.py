"""Swin Transformers: timm's network with our configuration, draws and weight files."""
