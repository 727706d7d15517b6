"""Loss of a class head and a distillation head, with its gradient. Imports backend.py only."""
