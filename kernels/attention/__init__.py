"""Exact softmax attention, from separate or packed q, k and v. Imports backend.py and tiles.py only."""
