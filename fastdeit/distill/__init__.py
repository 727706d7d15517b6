"""Distillation: the loss of both heads, the frozen teacher and its classes, cached logits, attention maps.

May import: batch, checkpoint, config, curriculum, data, distributed, errors, kernels, models, pipelines, tuning.
"""
