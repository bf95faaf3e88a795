"""What `scripts/gpu_check.py` runs: correctness gate, cases, targets, report. See README.md."""
