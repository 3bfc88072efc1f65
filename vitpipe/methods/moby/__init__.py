"""MoBY: contrast with queues of keys, and a momentum target."""
