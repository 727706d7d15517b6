"""What works on this machine: each thing tried, in a process of its own, so that a crash costs one line of the page.

machine.py says what is here, checks.py what is tried, tries.py are the tries, page.py is what a person reads.

May import: cli, errors, export, kernels, models, pipelines, training.
"""
