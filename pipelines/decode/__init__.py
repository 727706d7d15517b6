"""From encoded images to pixels: DALI on a GPU, DALI, PyTorch and Pillow on a CPU.

May import: augment, bad_files, index.
"""
