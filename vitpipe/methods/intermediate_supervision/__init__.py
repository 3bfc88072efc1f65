"""Supervised classification with losses on features of several depths: pixels and classes."""
