"""Residual networks of convolutions, timm's."""
