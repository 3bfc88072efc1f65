"""Training methods: from a batch to named losses; one method per file."""
