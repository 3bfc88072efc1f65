"""Supervised classification with mixed images and soft targets."""
