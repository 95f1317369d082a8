"""Find images of evaluation sets in training data: the search, the sets, the findings and their page."""
