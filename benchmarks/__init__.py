"""Benchmarks: scripts of their own (`bench_*.py`), and the package `gpu` behind `scripts/gpu_check.py`."""
