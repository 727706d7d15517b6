"""One process among others: rank, world size and device, the few collectives, models on many GPUs, signals.

May import: errors.
"""
