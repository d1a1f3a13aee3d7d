"""A rank's shard of a key/value cache, and attention against all shards."""
