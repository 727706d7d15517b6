"""Vision transformers and their weights: the architectures of DeiT and DeiT III, and one way from a name, a folder or a
file to a model.

May import: checkpoint, config, curriculum, data, distributed, errors, kernels, pipelines.
"""
