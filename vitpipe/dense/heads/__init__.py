"""Heads of detection and segmentation, one folder each: settings in `config.py`, the head in `head.py`."""
