"""The two encoders: configuration, preprocessing, tokenizers, the registry of names, resizing, LoRA, FLOPs, fingerprints."""
