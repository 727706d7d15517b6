"""The model of cycles on code whose time one can tell, and the attention kernels' cycles against their floor."""

import pytest
import torch

from benchmarks import attention_cycles
from benchmarks.compile_case import programs_held
from benchmarks.sass_cycles import DRAM_BYTES, DRAM_LATENCY, L2_BYTES, Instruction, estimate, leaves, loops
from fastdeit.kernels.attention import tiles


def program(*texts, **fields):
    """Instructions that stall for a cycle and wait for nothing, then EXIT."""
    made = []
    for i, text in enumerate((*texts, "EXIT")):
        options = {"stall": 1, "sets": 7, "reads": 7, "waits": 0} | fields.get(f"at{i}", {})
        predicate = "P0" if text.startswith("@") else None
        text = text.removeprefix("@P0 ")
        made.append(Instruction(16 * i, text.split()[0], text, predicate, **options))
    return made


def cycles(code, resident=4, place="l2", trips=None, warps=4, **options):
    return estimate(
        code, warps=warps, resident=resident, trips=trips or {}, memory=lambda *_: place, waves=10, **options
    ).cycles


@pytest.mark.parametrize(
    "text, each",
    [("FFMA R0", 1), ("IADD3 R0", 2), ("MUFU.EX2 R0", 8), ("S2R R0", 1)],  # four schedulers, a warp on each
)
def test_a_full_pipe(text, each):
    assert cycles(program(*[text] * 200), resident=8) == pytest.approx(200 * each, rel=0.05)


def test_different_pipes_overlap():
    """Two programs' worth of warps fill what one leaves idle."""
    mixed = program(*["FFMA R0", "MUFU.EX2 R1"] * 100)
    assert cycles(mixed) == pytest.approx(800, rel=0.05)


def test_a_warp_that_stalls_leaves_the_scheduler_to_others():
    waiting = program(*["FFMA R0"] * 100, **{f"at{i}": {"stall": 8} for i in range(100)})
    assert cycles(waiting, resident=1) == pytest.approx(800 + 400, rel=0.02)  # and the launch of the next
    assert cycles(waiting, resident=4) == pytest.approx((800 + 400) / 4, rel=0.1)


def test_memory_is_bound_by_its_bandwidth_and_then_by_its_latency():
    many = program(*["LDG.E.128 R0"] * 100, "FFMA R0", at99={"sets": 0}, at100={"waits": 1})
    moved = 100 * 4 * 512
    assert cycles(many, place="dram") == pytest.approx(moved / DRAM_BYTES, rel=0.05)
    assert cycles(many, place="dram", useful=0.5) == pytest.approx(moved / 2 / DRAM_BYTES, rel=0.05)
    assert cycles(many, place="l2") == pytest.approx(moved / L2_BYTES, rel=0.05)
    assert cycles(many, place="off") < 250
    one = program("LDG.E R0", "FFMA R0", at0={"sets": 0}, at1={"waits": 1})
    assert cycles(one, resident=1, place="dram") == pytest.approx(DRAM_LATENCY + 400, rel=0.05)


def test_a_group_of_copies_is_waited_for():
    copied = program("LDGSTS.E.128 R0", "LDGDEPBAR", "DEPBAR.LE SB0, 0x0", "FFMA R0")
    assert cycles(copied, resident=1, place="dram") > DRAM_LATENCY + 400
    in_flight = program("LDGSTS.E.128 R0", "LDGDEPBAR", "DEPBAR.LE SB0, 0x1", "FFMA R0")
    assert cycles(in_flight, resident=1, place="dram") < 500


def test_a_loop_goes_round_as_often_as_is_said():
    body = program("FFMA R0", "FFMA R0", "@P0 BRA 0x0")
    assert loops(body) == [(0, 32)]
    assert cycles(body, trips={32: 99}) == pytest.approx(300, rel=0.05)
    left_inside = program("FFMA R0", "@P0 EXIT", "FFMA R0", "BRA 0x0")
    assert leaves(left_inside, (0, 48)) == 16
    assert cycles(left_inside, trips={16: 99}) == pytest.approx(400, rel=0.05)


def test_a_barrier_is_for_all_warps():
    uneven = program("FFMA R0", "BAR.SYNC 0x0", "FFMA R0")
    assert cycles(uneven, resident=1, warps=8) == pytest.approx(400 + 20, rel=0.1)


def test_a_loop_that_would_never_end_is_noticed():
    with pytest.raises(ValueError, match="the loops go round that are left at 0x10 is not said"):
        cycles(program("FFMA R0", "@P0 EXIT", "FFMA R0", "BRA 0x0"))


def test_wgmma_at_its_rate():
    """64 x 128 x 16 takes 64 cycles of the tensor cores; operands in shared memory no longer than that."""
    products = program(*["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4]"] * 50, "WARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert cycles(products, resident=3) == pytest.approx(50 * 64, rel=0.1)


def test_programs_of_a_multiprocessor():
    assert programs_held(90, 4, 168, 45312) == 3  # 65,536 registers: 128 threads of 168
    assert programs_held(90, 4, 128, 61440) == 3  # 228 KB: three of 61 KB
    assert programs_held(80, 4, 128, 61440) == 2  # 164 KB
    assert programs_held(90, 8, 255, 1024) == 1
    assert programs_held(90, 4, 16, 0) == 16  # 64 warps
    assert programs_held(100, 4, 32, 0, tensor_columns=256) == 2


def test_attention_takes_at_least_its_floor():
    config = next(iter(tiles.forward_candidates(tiles.Shape(90, 130, 130, 64, torch.bfloat16)).values()))
    row = attention_cycles.row("test", "forward", 130, 64, config)
    assert int(row["floor"]) == round(130 * 64 * 2 * 4 / DRAM_BYTES) < int(row["cycles"]) < 3 * int(row["floor"])
    assert row["tiles"] == config.name and int(row["registers"]) <= 168
