"""The paper's evaluation: suites of sets, features once, zero-shot, probes, retrieval, and a report to cite."""
