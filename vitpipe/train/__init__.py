"""The run: loop, state, checkpoints, ranks, precision, average, health."""
