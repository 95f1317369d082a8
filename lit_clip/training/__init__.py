"""Optimiser and schedule, micro-batches, activation checkpointing, the plan, checkpoint files, FSDP."""
