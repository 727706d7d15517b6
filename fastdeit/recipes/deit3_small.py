"""DeiT III ViT-S on ImageNet-1k, from labels alone; after arXiv 2204.07118.

    python -m fastdeit.train --recipe deit3_small --data-path DIR

22 M parameters, trained at 224 pixels for 800 epochs with 2,048 images a step over all processes (256 on eight
GPUs): LAMB, binary cross entropy, 3-Augment. Top-1 that facebookresearch/deit README_revenge.md reports, not
measured here: 81.4 %.
"""

from fastdeit.config import Config, Data, Model, Optimization


def config() -> Config:
    return deit3("deit3_small_patch16_224", input_size=224, lr=4e-3, drop_path=0.05)


def deit3(model: str, *, input_size: int, lr: float, drop_path: float) -> Config:
    """What the DeiT III recipes share."""
    return Config(
        data=Data(batch_size=256, input_size=input_size, aa="3aug", color_jitter=0.3, reprob=0.0, eval_crop_ratio=1.0),
        model=Model(model=model, drop_path=drop_path),
        optimization=Optimization(
            epochs=800, opt="lamb", lr=lr, unscale_lr=True, weight_decay=0.05, smoothing=0.0, bce_loss=True
        ),
    )
