"""The folder of a run and the checkpoints in it: written whole or not at all, found, read and resumed.

May import: config, distributed, errors.
"""
