"""The folder of a run and the checkpoints in it: written completely or not at all, found, read, resumed from.

May import: config, curriculum, distributed, errors.
"""
