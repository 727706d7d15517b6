"""The 20 closing epochs of DeiT III at 224 pixels; here for ViT-B, another by --model and --drop-path.

    python -m fastdeit.train --recipe deit3_finetune --data-path DIR --finetune CHECKPOINT

AdamW at 1e-5, RandAugment and cross entropy in place of LAMB, 3-Augment and binary cross entropy
(facebookresearch/deit README_revenge.md, which reports 83.8 % for ViT-B on ImageNet-1k after it; not measured here).
"""

from fastdeit.config import Config, Data, Model, Optimization

FINETUNES = True  # refused without weights to begin with


def config() -> Config:
    return Config(
        data=Data(batch_size=64, input_size=224, reprob=0.0, repeated_aug=False, eval_crop_ratio=1.0),
        model=Model(model="deit3_base_patch16_224", drop_path=0.2),
        optimization=Optimization(epochs=20, lr=1e-5, unscale_lr=True, weight_decay=0.1, smoothing=0.1),
    )
