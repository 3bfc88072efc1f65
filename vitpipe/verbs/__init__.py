"""Verbs of the command line that have a file of their own; each registers itself and imports late."""
