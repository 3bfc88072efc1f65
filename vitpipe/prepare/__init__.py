"""From the user's files to shards: examine, pack, summarise, upload, and download by DVC."""
