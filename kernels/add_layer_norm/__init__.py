"""Residual addition, LayerScale, drop path and LayerNorm in one pass. Imports backend.py only."""
