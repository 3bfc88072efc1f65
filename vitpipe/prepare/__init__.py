"""From the user's files to shards: examined, packed, summed up, uploaded, and pulled by DVC."""
