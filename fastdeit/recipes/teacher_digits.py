"""The demo's teacher: a small CNN, from random weights, on the digits.

    python -m fastdeit.train --recipe teacher_digits

About half a minute on two CPU cores.
"""

from fastdeit.config import Config, Data, Model, Optimization


def config() -> Config:
    return Config(
        data=Data(
            input_size=16, batch_size=64, scale=(0.8, 1.0), hflip=0.0, aa="none", color_jitter=0.0, reprob=0.0,
            repeated_aug=False, mixup=0.0, cutmix=0.0, eval_crop_ratio=1.0,
        ),
        model=Model(model="test_resnet", drop_path=0.0, model_ema=False),
        optimization=Optimization(epochs=30, lr=4e-3, unscale_lr=True, warmup_epochs=2, smoothing=0.0),
    )  # fmt: skip
