"""Losses: plain definitions, tiled and distributed forms, duplicates, distillation."""
