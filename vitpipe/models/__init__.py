"""What is trained: pure torch, one folder per family of networks, the paper cited at the top of each file."""
