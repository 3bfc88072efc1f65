"""What to do: the typed recipe, how it is read, how "auto" is resolved, and its identity."""
