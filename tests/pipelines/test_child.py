"""Calls in a process of their own: what happens to one costs that one."""

import os
import time

from fastdeit.pipelines.child import Call, Outcome, outcomes

HERE = "tests.pipelines.in_child"


def test_a_crash_a_hang_and_an_exit_cost_one_call_each():
    names = ["twice", "crashes", "twice", "hangs", "twice", "leaves", "raises", "twice"]
    arguments = {"twice": ([3],), "leaves": (7,)}
    began = time.monotonic()
    found = outcomes([Call(f"{HERE}:{name}", arguments.get(name, ())) for name in names], seconds=2)
    assert 2 <= time.monotonic() - began < 20
    assert found == [
        Outcome([3, 3]), Outcome(failure="SIGSEGV", ended=True),
        Outcome([3, 3]), Outcome(failure="not finished after 2 s", ended=True),
        Outcome([3, 3]), Outcome(failure="its process ended with exit code 7: the last words", ended=True),
        Outcome(failure="LookupError: no such thing"), Outcome([3, 3]),
    ]  # fmt: skip


def test_calls_share_a_process_which_is_not_this_one():
    first, second, other = outcomes(
        [Call(f"{HERE}:process"), Call(f"{HERE}:process"), Call(f"{HERE}:variable", ("GIVEN",))], seconds=20,
        environment={"GIVEN": "yes"},
    )  # fmt: skip
    assert first == second and first.value != os.getpid() and other.value == "yes"


def test_what_cannot_be_imported_is_a_failure():
    (found,) = outcomes([Call("fastdeit.absent:f")], seconds=20)
    assert found.failure.startswith("ModuleNotFoundError") and not found.ended
