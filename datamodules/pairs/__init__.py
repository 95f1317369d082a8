"""Sources of (image, caption) pairs with random access: tables, parquet, saved data sets, COCO's JSON and folders."""
