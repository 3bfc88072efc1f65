"""The published tables as data: one YAML file per paper, one row per number."""
