"""The commands about data, one per file: inspect, overlap, shard."""
