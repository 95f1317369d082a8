"""From samples to batches: sampling, decoding, augmentation, bad samples, and stores."""
