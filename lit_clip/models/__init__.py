"""The two encoders: configuration, preprocessing, tokenizers, names, resizing, LoRA, FLOPs, fingerprints."""
