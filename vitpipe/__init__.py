"""vitpipe: from raw images to a table that stands beside the paper's table."""

__version__ = "0.1.0"
