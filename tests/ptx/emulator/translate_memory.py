"""PTX moves, loads, stores, atomics and asynchronous copies as Python. See translate_arithmetic.py."""

import re

from .operands import Unsupported, bits, numpy_type
from .parse import BYTES

ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas")


def movement(e, part, t, a):
    if part[0] not in ("mov", "cvta"):
        return None
    if a[0].startswith("{"):
        parts = e.vector(a[0])
        kind = f"b{8 * BYTES[t] // len(parts)}"
        return [f"v = unpack({e.src(a[1], t)}, {len(parts)})", *e.set_each(parts, kind)]
    if a[1].startswith("{"):
        parts = e.vector(a[1])
        return e.set(a[0], f"pack([{e.sources(parts, f'b{8 * BYTES[t] // len(parts)}')}], X.n)", t)
    t = t if t == "pred" else bits(t)
    if a[1] == "global_smem" and t == "b64":
        return e.set(a[0], "X.smem.astype(u8)", t)
    return e.set(a[0], e.src(a[1], t), t)


def memory(e, part, t, a):
    root = part[0]
    if root == "ld" and part[1] == "param":
        return _parameter(e, t, a)
    if root in ("ld", "st", "atom", "red"):
        return _access(e, root, part, t, a)
    if root == "cp" and part[1] == "async":
        return _asynchronous(e, part, a)
    return None


def _parameter(e, t, a):
    match = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(\d+))?\s*\]", a[1])
    assert match, a[1]
    base, offset = e.src(match[1], "b32"), int(match[2] or 0)
    lines = []
    for i, dst in enumerate(e.vector(a[0])):
        lines += e.set(dst, f"X.param({base}, {numpy_type(t)}, {offset + i * BYTES[t]})", t)
    return lines


def _access(e, root, part, t, a):
    space = next((p for p in part if p in ("global", "shared", "shared::cta")), None)
    if space is None:
        raise Unsupported(".".join(part))
    where, width = ("X.S", 4) if space.startswith("shared") else ("X.G", 8)
    size, raw = BYTES[t], bits(t)
    if root == "ld":
        destinations = e.vector(a[0])
        lines = [f"v = X.load({where}, {e.address(a[1], width)}, {size}, {len(destinations)}, {e.mask})"]
        if t[0] == "s":  # a wider register keeps the sign
            sets = [x for i, d in enumerate(destinations) for x in e.set(d, f"v[{i}].view({numpy_type(t)})", t)]
        else:
            sets = e.set_each(destinations, raw)
        return lines + (["if v is not None:", *("    " + line for line in sets)] if sets else [])
    if root == "st":
        values = e.sources(e.vector(a[1]), raw)
        return [f"X.store({where}, {e.address(a[0], width)}, {size}, [{values}], {e.mask})"]
    operation = next((p for p in part if p in ATOMICS), None)
    if operation is None:
        raise Unsupported(".".join(part))
    destination, rest = (a[0], a[1:]) if root == "atom" else ("_", a)
    values = e.sources([x for v in rest[1:] for x in e.vector(v)], t)
    lines = [f"v = X.atomic({where}, {e.address(rest[0], width)}, {operation!r}, {e.mask}, {values})"]
    sets = e.set(destination, f"v.view(u{size})", raw)
    return lines + (["if v is not None:", *("    " + line for line in sets)] if sets else [])


def _asynchronous(e, part, a):
    if part[2] == "commit_group":
        return [f"X.async_commit({e.mask})"]
    if part[2] == "wait_group":
        return [f"X.async_wait({int(a[0])}, {e.mask})"]
    if part[2] == "wait_all":
        return [f"X.async_commit({e.mask})", f"X.async_wait(0, {e.mask})"]
    if part[2] in ("ca", "cg"):
        real = e.src(a[3], "b32") if len(a) > 3 and not a[3].startswith("[") else "None"
        return [f"X.async_copy({e.address(a[0], 4)}, {e.address(a[1], 8)}, {int(a[2], 0)}, {real}, {e.mask})"]
    raise Unsupported(".".join(part))
