"""The paper's evaluation.

- Metrics, pure functions: ``accuracy``, ``scores``, ``retrieval_metrics``, ``geolocation``, ``overlap``, ``bias``,
  ``robustness``.
- Classifiers: ``prompts`` and ``zero_shot`` from texts, ``probe``, ``few_shot`` and ``logistic`` from labels.
- Sets: ``data`` (their interface), ``targets``, ``suite`` (their YAML), ``set_encoding`` and ``store`` (features).
- Results: ``tasks``, ``results``, ``overview``, ``published`` (figures to compare with), ``report``.
"""
