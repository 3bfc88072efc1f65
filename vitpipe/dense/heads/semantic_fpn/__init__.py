"""Semantic FPN's head."""
