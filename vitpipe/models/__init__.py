"""What is trained: pure torch, one architecture per file, the paper cited on top."""
