"""`lit-clip inspect`: scan of a source of pairs, summary of the findings, HTML page."""
