"""The commands about data, one per file: embed, inspect, overlap, score, shard."""
