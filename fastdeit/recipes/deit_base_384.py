"""DeiT-B, trained at 224 pixels, fine-tuned at 384; after facebookresearch/deit README_deit.md.

    python -m fastdeit.train --recipe deit_base_384 --data-path DIR --finetune CHECKPOINT

512 images a step over all processes; the original's README reports 20 hours on 8 GPUs. Position embeddings are
interpolated. The original fine-tunes with the model in evaluation mode, which for a DeiT means no stochastic depth.
Top-1 on ImageNet-1k that the paper reports, not measured here: 83.1 %.
"""

from fastdeit.config import Config, Data, Model, Optimization

FINETUNES = True  # refused without weights to begin with


def config() -> Config:
    return Config(
        data=Data(input_size=384, batch_size=32, eval_crop_ratio=1.0),
        model=Model(model="deit_base_patch16_384", drop_path=0.0),
        optimization=Optimization(epochs=30, lr=5e-6, min_lr=5e-6, weight_decay=1e-8),
    )
