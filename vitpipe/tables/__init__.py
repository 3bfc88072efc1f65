"""Published tables and our own references as runs: what they take, what they share, what they give."""
