"""The graph and its stages: one file per stage."""
