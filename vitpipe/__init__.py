"""vitpipe: from raw images to a table that stands beside the paper's table."""

# In every process, because one that was spawned unpickles a plugin's classes before it imports anything else.
import vitpipe.contracts.discovery  # noqa: F401

__version__ = "0.1.0"
