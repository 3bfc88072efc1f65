"""Mask R-CNN's heads."""
