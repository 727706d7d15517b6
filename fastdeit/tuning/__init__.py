"""Choices by measurement: of several ways to compute the same thing, the one that is fastest on this machine.

    tuner = Tuner(world, mode="auto")
    choice = tuner.choose("attention", {"sdpa": build_sdpa, "fused": build_fused}, default="sdpa", key={...}, dtype=...)
    print(tuner.table())

A candidate is a function without arguments that builds another, which computes once and returns tensors. What it
returns must agree with what the default returns. The Tuner of a run is made by `of_run`; what it is asked about the
student stands in training/student_tuning.py, about the teacher in distill/layouts.py.

May import: checkpoint, config, distributed, errors.
"""

from .choose import Choice, Row, Tuner, of_run

__all__ = ["Choice", "Row", "Tuner", "of_run"]
