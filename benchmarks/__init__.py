"""Benchmarks that are run as `python -m benchmarks.bench_ops` from the repository's root.

`timing` (the one timer), `neighbours` and `processes` need the standard library alone, so that rivals of any
environment can take part.
"""
