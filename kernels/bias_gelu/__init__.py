"""Bias and exact GELU in one pass. Imports autograd.py, backend.py and gelu.py."""
