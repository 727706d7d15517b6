"""PTX instructions of a whole warp, of the tensor cores, and barriers as Python. See translate_arithmetic.py."""

import re

from .operands import Unsupported

NOTHING = ("fence", "membar", "prefetch", "nanosleep", "griddepcontrol")


def warp_wide(e, part, t, a):
    root = part[0]
    if root == "shfl":
        if "|" in a[0]:
            raise Unsupported(".".join(part))
        return e.set(a[0], f"X.shuffle({part[2]!r}, {e.sources(a[1:4], 'b32')}, {e.mask})", "b32")
    if root == "redux":
        if "abs" in part:
            raise Unsupported(".".join(part))
        return e.set(a[0], f"X.redux({part[2]!r}, {e.src(a[1], t)}, {e.mask}, {'NaN' in part})", t)
    if root == "vote":
        p = e.src(a[1], "pred")
        if part[2] == "ballot":
            return e.set(a[0], f"X.ballot({p}, {e.mask})", "b32")
        return e.set(a[0], f"X.vote({part[2]!r}, {p}, {e.mask})", "pred")
    if root == "elect":
        return e.set(a[0].partition("|")[2], "X.elect()", "pred")
    if root == "ldmatrix":
        destinations = e.vector(a[0])
        load = f"v = X.ldmatrix({e.address(a[1], 4)}, {len(destinations)}, {'trans' in part}, {e.mask})"
        return [load, *e.set_each(destinations, "b32")]
    if root == "stmatrix":
        values = e.sources(e.vector(a[1]), "b32")
        return [f"X.stmatrix({e.address(a[0], 4)}, [{values}], {'trans' in part}, {e.mask})"]
    return None


def tensor_core(e, part, t, a):
    root = part[0]
    return {"mma": _mma, "wgmma": _wgmma, "tcgen05": _tcgen05}[root](e, part, a) if root in (
        "mma", "wgmma", "tcgen05") else None  # fmt: skip


def _mma(e, part, a):
    shape = next(p for p in part if re.fullmatch(r"m\d+n\d+k\d+", p))
    types = part[-4:]
    if types[0] != "f32" or types[3] != "f32" or types[1] != types[2]:
        raise Unsupported(".".join(part))
    d, *operands = (e.vector(v) for v in a)
    x, y, c = (e.sources(v, "b32") for v in operands)
    return [f"v = X.mma({shape!r}, {types[1]!r}, [{x}], [{y}], [{c}], {e.mask})", *e.set_each(d, "b32")]


def _wgmma(e, part, a):
    if part[1] == "fence":
        return [f"X.wgmma_fence({e.mask})"]
    if part[1] == "commit_group":
        return [f"X.wgmma_commit({e.mask})"]
    if part[1] == "wait_group":
        return [f"X.wgmma_wait(R, {int(a[0])}, {e.mask})"]
    shape = next(p for p in part if re.fullmatch(r"m64n\d+k\d+", p))
    types = part[-3:]
    signs, transposed = [int(v) for v in a[4:6]], [int(v) for v in a[6:]]
    if types[0] != "f32" or types[1] != types[2] or signs != [1, 1]:
        raise Unsupported(".".join(part))
    d = tuple(e.slots[x] for x in e.vector(a[0]))
    if a[1].startswith("{"):  # the left operand lies in registers
        registers = e.vector(a[1])
        x, slots = f"[{e.sources(registers, 'b32')}]", [e.slots[o] for o in registers]
        transposed = [0, *transposed] if transposed else [0, 0]
    else:
        x, slots = e.src(a[1], "b64"), []
        transposed = transposed or [0, 0]
    y, accumulate = e.src(a[2], "b64"), e.src(a[3], "pred")
    return [
        f"X.wgmma(R, {shape!r}, {types[1]!r}, {d}, {x}, {slots}, {y}, {accumulate}, "
        f"{transposed[0]}, {transposed[1]}, {e.mask})"
    ]


def _tcgen05(e, part, a):
    kind = part[1]
    if kind == "alloc":
        return [f"X.tensor_alloc({e.address(a[0], 4)}, {int(a[1])}, {e.mask})"]
    if kind in ("dealloc", "relinquish_alloc_permit", "wait::ld", "wait::st") or kind.startswith("fence"):
        return []
    if kind == "commit":
        return [f"X.tensor_commit({e.address(a[0], 4)}, {e.mask})"]
    if kind in ("ld", "st") and not {"unpack::16b", "pack::16b"} & set(part):
        shape = next(p for p in part if re.fullmatch(r"\d+x\d+bx?\d*", p))
        if kind == "ld":
            d, split = e.vector(a[0]), int(a[2], 0) if len(a) > 2 else 0
            load = f"v = X.tensor_load({e.address(a[1], 4)}, {shape!r}, {len(d)}, {split}, {e.mask})"
            return [load, *e.set_each(d, "b32")]
        values, split = e.sources(e.vector(a[-1]), "b32"), int(a[1], 0) if len(a) > 2 else 0
        return [f"X.tensor_store({e.address(a[0], 4)}, {shape!r}, [{values}], {split}, {e.mask})"]
    if kind == "mma" and {"kind::f16", "kind::tf32"} & set(part) and "cta_group::1" in part and len(a) == 5:
        inside = a[1].startswith("[")  # the left operand lies in tensor memory
        x = e.address(a[1], 4) if inside else e.src(a[1], "b64")
        rest = f"{e.src(a[2], 'b64')}, {e.src(a[3], 'b32')}, {e.src(a[4], 'pred')}"
        return [f"X.tensor_product({e.address(a[0], 4)}, {x}, {inside}, {rest}, {e.mask}, {'kind::tf32' in part})"]
    raise Unsupported(".".join(part))


def synchronization(e, part, t, a):
    root = part[0]
    if root == "mbarrier":
        if part[1] == "init":
            return [f"X.barrier_init({e.address(a[0], 4)}, {int(a[1])}, {e.mask})"]
        if part[1] == "inval":
            return [f"X.barrier_invalidate({e.address(a[0], 4)}, {e.mask})"]
        if part[1] in ("try_wait", "test_wait") and part[2] == "parity":
            return e.set(a[0], f"X.barrier_try_wait({e.address(a[1], 4)}, {e.src(a[2], 'b32')}, {e.mask})", "pred")
    if root in ("bar", "barrier"):
        if part[1] == "warp":
            return []
        if part[1] == "sync" or part[1:3] == ["cta", "sync"]:
            return ["X.barrier()"]
    if root == "fence" and part[1:3] == ["proxy", "async"]:
        return [f"X.proxy_fence({e.mask})"]
    return [] if root in NOTHING else None
