"""The paper's evaluation.

- Metrics, pure functions: ``accuracy``, ``scores``, ``image_retrieval``, ``document_retrieval``, ``caption_choice``,
  ``geolocation``, ``overlap``, ``bias``, ``confusions``, ``thresholds``; ``retrieval`` (over the ranks), ``intervals``;
  ``class_metrics``: torchmetrics by class path; ``segmentation``, ``pointing``.
- Classifiers: ``prompts`` and ``zero_shot`` from texts, ``probe``, ``few_shot``, ``class_head`` and ``logistic`` from
  labels, ``other_classes`` (probes tested on another set).
- Sets: ``data`` (their interface), ``targets``, ``suite`` (their YAML), ``download``, ``open_set`` and ``files_read``,
  ``set_encoding`` and ``store`` (features, and what tasks record of ``places``).
- Results: ``run`` (a suite), ``tasks``, ``classification`` (two of them), ``predictions``, ``results``, ``comparison``
  (of runs), ``overview``, ``published`` (figures to compare with), ``report``.
"""
