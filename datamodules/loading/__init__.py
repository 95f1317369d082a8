"""From samples to batches: sampling, decoding and augmentation, bad samples, the cache."""
