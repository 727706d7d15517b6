"""Distillation: the loss of both heads, the frozen teachers and their classes, cached logits, attention maps, features.

May import: batch, checkpoint, config, curriculum, data, distributed, errors, kernels, models, pipelines, tuning.
"""
