"""The commands about data, one per file: embed (``recall_check``: its --check), inspect, overlap, score, shard."""
