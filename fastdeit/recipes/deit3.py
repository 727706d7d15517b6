"""DeiT III on ImageNet-1k, from labels alone; after arXiv 2204.07118 and facebookresearch/deit README_revenge.md."""

from fastdeit.config import Config, Data, Model, Optimization


def _deit3(model: str, *, input_size: int, lr: float, drop_path: float) -> Config:
    return Config(
        data=Data(input_size=input_size, aa="3aug", color_jitter=0.3, reprob=0.0, eval_crop_ratio=1.0),
        model=Model(model=model, drop_path=drop_path),
        optimization=Optimization(
            epochs=800, opt="lamb", lr=lr, unscale_lr=True, weight_decay=0.05, smoothing=0.0, bce_loss=True
        ),
    )


def deit3_small() -> Config:
    """DeiT III ViT-S on ImageNet-1k, from labels alone; after arXiv 2204.07118.

        python -m fastdeit.train --recipe deit3_small --data-path DIR

    22 M parameters, trained at 224 pixels for 800 epochs with 2,048 images a step over all processes (256 on eight
    GPUs): LAMB, binary cross entropy, 3-Augment. Top-1 that facebookresearch/deit README_revenge.md reports, not
    measured here: 81.4 %.
    """
    return _deit3("deit3_small_patch16_224", input_size=224, lr=4e-3, drop_path=0.05)


def deit3_base() -> Config:
    """DeiT III ViT-B on ImageNet-1k, from labels alone; after arXiv 2204.07118.

        python -m fastdeit.train --recipe deit3_base --data-path DIR

    87 M parameters, as deit3_small, but at 192 pixels. The paper then fine-tunes 20 epochs at 224: recipe
    deit3_finetune. Top-1 at 224 pixels that the original's README_revenge.md reports, not measured here: 83.8 %.
    """
    return _deit3("deit3_base_patch16_224", input_size=192, lr=0.003, drop_path=0.2)


def deit3_large() -> Config:
    """DeiT III ViT-L on ImageNet-1k, from labels alone; after arXiv 2204.07118.

        python -m fastdeit.train --recipe deit3_large --data-path DIR

    304 M parameters, as deit3_small, but at 192 pixels. The paper then fine-tunes 20 epochs at 224: recipe
    deit3_finetune. Top-1 at 224 pixels that the original's README_revenge.md reports, not measured here: 84.9 %.
    """
    return _deit3("deit3_large_patch16_224", input_size=192, lr=0.003, drop_path=0.45)


def deit3_finetune() -> Config:
    """The last 20 epochs of DeiT III, at 224 pixels; here for ViT-B, others by --model and --drop-path.

        python -m fastdeit.train --recipe deit3_finetune \\
            --data-path DIR --finetune CHECKPOINT

    AdamW at 1e-5, RandAugment and cross entropy in place of LAMB, 3-Augment and binary cross entropy
    (facebookresearch/deit README_revenge.md, which reports 83.8 % for ViT-B on ImageNet-1k after it; not measured
    here).
    """
    return Config(
        data=Data(input_size=224, reprob=0.0, repeated_aug=False, eval_crop_ratio=1.0),
        model=Model(model="deit3_base_patch16_224", drop_path=0.2),
        optimization=Optimization(epochs=20, lr=1e-5, unscale_lr=True, weight_decay=0.1, smoothing=0.1),
    )
