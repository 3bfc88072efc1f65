"""Datasets: catalogue of facts, readers of the released formats, dense layouts, the embedded sets."""
