"""The report page of an evaluation, its charts and tables, and the same in TensorBoard."""
