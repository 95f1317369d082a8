"""Reports of an evaluation: the HTML page, its charts, the terminal's table, TensorBoard."""
