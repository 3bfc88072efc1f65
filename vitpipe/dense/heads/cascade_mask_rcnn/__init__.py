"""Cascade Mask R-CNN's heads."""
