"""Checks and times the GPU path in one call: ``python -m bench.gpu``."""
