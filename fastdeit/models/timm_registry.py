"""Registers every model of deit.py with timm under `fastdeit_NAME`, where timm is installed.

    timm.create_model("fastdeit_deit_tiny_distilled_patch16_224", num_classes=10, drop_path_rate=0.1)

As in timm, these average the two heads in training too, until set_distilled_training(True); pretrained=True gives them
the weights that timm publishes for NAME.
"""

from timm.models import register_model

from .architectures import model_names


def _entrypoint(name: str, create_model):
    def create(
        pretrained=False,
        pretrained_cfg=None,
        pretrained_cfg_overlay=None,
        cache_dir=None,
        drop_path_rate=0.0,
        in_chans=3,
        **kwargs,
    ):
        model = create_model(name, drop_path=drop_path_rate, in_chans=in_chans, **kwargs)
        if pretrained:
            from . import sources, weights

            tag = f".{pretrained_cfg}" if isinstance(pretrained_cfg, str) else ""
            weights.load_weights(model, sources.of_model(name + tag), new_head="num_classes" in kwargs)
        model.set_distilled_training(False)
        return model

    create.__name__ = create.__qualname__ = f"fastdeit_{name}"
    create.__doc__ = f"fastdeit's {name}; see fastdeit.models.deit.create_model."
    return create


def register(create_model) -> None:
    """create_model: deit.create_model"""
    for name in model_names():
        globals()[f"fastdeit_{name}"] = register_model(_entrypoint(name, create_model))
