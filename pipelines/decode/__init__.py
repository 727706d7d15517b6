"""From plans and encoded images to uint8 pixels: with DALI on a GPU; with DALI, PyTorch and Pillow on a CPU.

May import: augment, bad_files, index.
"""
