"""Trained models in the forms that timm, transformers, ONNX and PyTorch read: `formats` from Python, `python -m
fastdeit.export` from the command line.

May import: checkpoint, cli, config, distributed, errors, models, pipelines.
"""
