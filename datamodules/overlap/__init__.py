"""`lit-clip overlap`: search for evaluation images in training data, findings by set, HTML page."""
