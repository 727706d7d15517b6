"""A run: the step, the epochs around it, what is logged, when a checkpoint is written.

May import: batch, checkpoint, config, curriculum, data, distill, distributed, errors, evaluation, kernels, models,
tuning.
"""
