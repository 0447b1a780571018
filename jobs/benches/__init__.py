"""The benchmarks of `jobs/bench.py`, one a file; `measure.py` and `models.py` are what they share."""
