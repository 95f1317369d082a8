"""The paper's evaluation.

- Metrics, pure functions: ``scores`` (the records of all), ``targets``, ``image_retrieval`` (and geolocation),
  ``document_retrieval``, ``caption_choice``, ``segmentation`` (and pointing), ``overlap``, ``bias``, ``thresholds``,
  ``intervals``; ``class_metrics``: torchmetrics by class path.
- Classifiers: ``prompts`` and ``zero_shot`` from texts; ``probe``, ``few_shot``, ``class_head``, ``logistic``.
- Sets: ``data`` (their interface), ``suite`` (their YAML), ``download``, ``open_set``; ``set_encoding``,
  ``store`` (features, and what tasks record of ``places``).
- Results: ``run`` (a suite), ``tasks``, ``classification``, ``predictions``, ``results``, ``comparison`` (of runs),
  ``overview``, ``published`` (figures to compare with), ``report``.
"""
