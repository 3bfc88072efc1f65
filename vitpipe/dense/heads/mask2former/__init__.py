"""Mask2Former's head."""
