"""Decode every image of a folder in batches of 64, whole and in part; a process of its own, for it might crash.

python decode_variants.py FOLDER OUT: OUT (.npz) receives, for each image that the index takes and DALI decodes, its
name, its pixels (`whole`) and those of one window (`part`: top, left, height, width), and `causes`, name: cause.
"""

import json
import sys
from pathlib import Path

import numpy as np

from fastdeit.pipelines import Augmentation, BadFiles, eval_loader, open_folder, train_loader
from fastdeit.pipelines.augment.crop import full_windows
from fastdeit.pipelines.decode.graph import window_graph, window_inputs

BATCH = 64


def main(folder: str, out: str) -> None:
    index = open_folder(folder)
    bad_files = BadFiles.of(index, limit=1)
    settings = {"batch_size": BATCH, "num_threads": 2, "input_size": 32, "bad_files": bad_files}
    for _ in eval_loader(index, **settings):
        pass
    for _ in train_loader(index, augmentation=Augmentation(aa="none", color_jitter=0, repeats=1), **settings):
        pass
    causes = {Path(name).name: cause for name, cause in bad_files.causes.items()}
    good = np.array([i for i in range(len(index)) if index.name(i) not in bad_files])
    windows = full_windows(index.heights[good], index.widths[good])
    parts = np.stack([windows[:, 2] // 3, windows[:, 3] // 4, (windows[:, 2] + 1) // 2, (windows[:, 3] + 2) // 3], 1)
    arrays = {"causes": np.array(json.dumps(causes))}
    for what, boxes in (("whole", windows), ("part", parts)):
        graph = window_graph(index, BATCH, 2)
        for start in range(0, len(good), BATCH):
            rows = slice(start, start + BATCH)
            graph.submit(window_inputs(index, good[rows], boxes[rows]))
            (images,) = graph.collect()
            for i, image in zip(good[rows].tolist(), images):
                arrays[f"{what}/{Path(index.name(i)).name}"] = np.array(image)
    for i, box in zip(good.tolist(), parts):
        arrays[f"window/{Path(index.name(i)).name}"] = box
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
