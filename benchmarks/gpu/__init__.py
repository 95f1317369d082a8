"""The parts of ``on_a_gpu.py``: each has ``rows(setting)``, which yields one dictionary per measurement."""
