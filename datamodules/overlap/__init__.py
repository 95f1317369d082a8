"""`lit-clip overlap`: search for evaluation images in training data, report findings by set, and write a page."""
