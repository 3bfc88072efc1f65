"""How it learns: a batch in, named losses out; one method per file."""
