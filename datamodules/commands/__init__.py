"""The commands about data, one a file: inspect, overlap, shard."""
