"""Fused operations for vision transformers. They know tensors only, and import nothing else of fastdeit.

Each operation is a folder, which imports neither another operation nor `integrations`, only the modules beside it
(`autograd`, `backend`, `gelu`, `tiles`):

    api.py         the public function: its checks, and its registration with PyTorch
    reference.py   plain PyTorch: the CPU path, and the oracle of the tests
    triton_*.py    the Triton kernels and their launches, imported at the first call that needs them
"""

# With the repository's root on sys.path this folder is also found under the bare name `kernels`, which is how
# transformers looks for the package of that name on PyPI. Executed a second time, the files would register every
# operation again and leave those in use dangling: under that name there is nothing here.
if __name__ == "fastdeit.kernels":
    from .add_layer_norm.api import add_layer_norm
    from .attention.api import attention, attention_qkvpacked
    from .attention.varlen import attention_varlen
    from .attention_distillation_loss.api import attention_distillation_loss
    from .bias_gelu.api import bias_gelu
    from .distillation_loss.api import distillation_loss
    from .integrations.apply import apply_to, apply_to_timm
    from .integrations.report import attention_calls
    from .integrations.transformers_models import apply_to_transformers, register_with_transformers
    from .mix_normalize.api import mix_normalize
    from .mlp.api import mlp

    __all__ = [
        "add_layer_norm",
        "apply_to",
        "apply_to_timm",
        "apply_to_transformers",
        "attention",
        "attention_calls",
        "attention_distillation_loss",
        "attention_qkvpacked",
        "attention_varlen",
        "bias_gelu",
        "distillation_loss",
        "mix_normalize",
        "mlp",
        "register_with_transformers",
    ]
