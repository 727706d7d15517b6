"""Bias and exact GELU in one pass. Imports backend.py only."""
