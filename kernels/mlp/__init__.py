"""A transformer's MLP, its hidden state recomputed rather than kept. Imports autograd.py, backend.py and gelu.py."""
