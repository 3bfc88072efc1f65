"""PaCa's segmentation head."""
