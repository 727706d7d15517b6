"""Handwritten digits: the student of a run without --data-path, and its teacher."""

from fastdeit.config import Config, Data, Distillation, Model, Optimization


def _digits() -> Data:
    """8 x 8 pixels, grey: no flips, colours or operations that would turn one digit into another."""
    return Data(
        input_size=16, batch_size=64, scale=(0.8, 1.0), hflip=0.0, aa="none", color_jitter=0.0, reprob=0.0,
        repeated_aug=False, mixup=0.0, cutmix=0.0, eval_crop_ratio=1.0,
    )  # fmt: skip


def demo() -> Config:
    """The default run: handwritten digits, few of them with labels; a small CNN as teacher, a nano DeiT as student.

        python -m fastdeit.train

    Of scikit-learn's digits 100 keep their labels, from which the teacher learns, and 1,337 lose them. Minutes on two
    CPU cores; the README quotes the accuracies measured over five seeds (`python -m benchmarks.demo`).
    """
    config = Config(
        data=_digits(),
        model=Model(model="deit_nano_distilled_patch4_16", drop_path=0.0, model_ema_decay=0.99),
        distillation=Distillation(distillation_type="hard", teacher_model="test_resnet", compare_undistilled=True),
        optimization=Optimization(epochs=30, lr=2e-3, unscale_lr=True, warmup_epochs=2),
    )
    config.data.reprob = 0.25
    return config


def teacher_digits() -> Config:
    """The demo's teacher: a small CNN, from random weights, on the digits.

        python -m fastdeit.train --recipe teacher_digits

    About half a minute on two CPU cores.
    """
    return Config(
        data=_digits(),
        model=Model(model="test_resnet", drop_path=0.0, model_ema=False),
        optimization=Optimization(epochs=30, lr=4e-3, unscale_lr=True, warmup_epochs=2, smoothing=0.0),
    )
