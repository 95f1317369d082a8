"""What `lit-clip inspect` finds out about pairs: the scan, its summary and its page."""
