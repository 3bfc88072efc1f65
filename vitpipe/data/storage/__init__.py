"""Where shards lie: a folder or object storage, and the cache in front of what is far."""
