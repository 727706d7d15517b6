"""Train, distil, fine-tune and use Data-efficient Image Transformers (DeiT)."""

__version__ = "0.1.0"
