"""Distillation: the loss of both heads, the teacher as cheap as it can be, cached logits, attention maps.

May import: checkpoint, config, data, distributed, errors, kernels, models, pipelines.
"""
