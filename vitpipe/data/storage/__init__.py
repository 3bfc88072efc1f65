"""Storage of shards: a local folder or object storage, and the local cache of remote shards."""
