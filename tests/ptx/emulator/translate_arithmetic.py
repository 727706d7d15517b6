"""PTX arithmetic as Python. Each function takes the translator `e`, the opcode's parts, its last one `t` (the type) and
the operands `a`, and returns lines of code, or None where the instruction is none of its family's."""

from .operands import Unsupported, bits, numpy_type
from .parse import BYTES

FLOATS = ("f16", "f32", "f64", "bf16")
PACKED = ("f16x2", "bf16x2")
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">",
           "hs": ">="}  # fmt: skip
# Comparisons that are true of NaNs, by their opposite.
UNORDERED = {"neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
ROUND = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}
SIGN = {"add": "+", "sub": "-", "mul": "*"}


def floating(e, part, t, a):
    root = part[0]
    if t == "f32x2":
        return e.set(a[0], f"pairs({root!r}, X.n, {e.sources(a[1:], 'b64')})", "b64")
    if t in ("f16", "bf16") and part[-2] == "f32":  # half operands, float32 result
        if root in ("add", "sub"):
            return e.set(a[0], f"{e.src(a[1], t)}.astype(f4) {SIGN[root]} {e.src(a[2], 'f32')}", "f32")
        if root == "fma":
            return e.set(a[0], f"fma_f32({e.sources(a[1:3], t)}, {e.src(a[3], 'f32')})", "f32")
    if t in PACKED and root in ("add", "sub", "mul", "min", "max", "fma", "neg", "abs", "ex2", "tanh"):
        name = f"{root}{'_nan' if 'NaN' in part else ''}"
        return e.set(a[0], f"halves({name!r}, {t!r}, {e.sources(a[1:], 'b32')})", "b32")
    if t not in FLOATS:
        return None

    def flushed(code):
        return f"flush({code})" if "ftz" in part and t == "f32" else code

    def result(form):
        return e.set(a[0], flushed(form.format(*(flushed(e.src(x, t)) for x in a[1:]))), t)

    if root in SIGN:
        return result(f"{{}} {SIGN[root]} {{}}")
    if root in ("fma", "mad"):
        return result(f"fma_{t}({{}}, {{}}, {{}})")
    if root in ("min", "max"):
        name = f"np.{root}imum" if "NaN" in part else f"np.f{root}"
        return result(f"{name}({{}}, {{}})" if len(a) == 3 else f"{name}({name}({{}}, {{}}), {{}})")
    if root == "neg":
        return result("-{}")
    if root == "abs":
        return result("np.abs({})")
    if root == "div":
        name = next((f"{kind}_divide" for kind in ("approx", "full") if kind in part), None)
        return result(f"{name}({{}}, {{}})" if name else "{} / {}")
    if root in ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"):
        return result(f"{root}({{}})")
    if root == "copysign":
        return e.set(a[0], f"np.copysign({e.src(a[2], t)}, {e.src(a[1], t)})", t)
    if root == "testp":
        test = {"finite": "np.isfinite", "infinite": "np.isinf", "notanumber": "np.isnan", "number": "~np.isnan"}
        return e.set(a[0], f"{test[part[1]]}({e.src(a[1], t)})", "pred")
    return None


def integral(e, part, t, a):
    root = part[0]
    if root in ("add", "sub") and t in ("s16x2", "u16x2"):
        x, y = (f"{e.src(o, 'b32')}.view(u2)" for o in a[1:3])
        return e.set(a[0], f"({x} {SIGN[root]} {y}).view(u4)", "b32")
    if t[0] not in "us" or not t[1:].isdigit():
        return None
    b = bits(t)
    if root in ("add", "sub") and "cc" not in part:
        return e.set(a[0], f"{e.src(a[1], b)} {SIGN[root]} {e.src(a[2], b)}", b)
    if root in ("mul", "mad"):
        return _product(e, part, t, a)
    if root in ("min", "max"):
        return e.set(a[0], f"np.{root}imum({e.sources(a[1:3], t)})", t)
    if root == "neg":
        return e.set(a[0], f"(~{e.src(a[1], b)}) + u{BYTES[t]}(1)", b)
    if root == "abs":
        return e.set(a[0], f"np.abs({e.src(a[1], t)})", t)
    if root in ("div", "rem"):
        return e.set(a[0], f"divide({e.sources(a[1:3], t)}, {root == 'rem'}, {e.mask})", t)
    return None


def _product(e, part, t, a):
    half = part[1]
    if half == "lo":
        b = bits(t)
        code, kind = "{} * {}".format(*(e.src(x, b) for x in a[1:3])), b
    elif half == "wide":
        kind = t[0] + str(2 * int(t[1:]))
        wide = numpy_type(kind)
        code = "{} * {}".format(*(f"{e.src(x, t)}.astype({wide})" for x in a[1:3]))
    elif t in ("u64", "s64"):
        code, kind = f"high64({e.sources(a[1:3], t)})", t
    else:
        wide, kind = numpy_type(t[0] + str(2 * int(t[1:]))), t
        factors = (f"{e.src(x, t)}.astype({wide})" for x in a[1:3])
        code = "(({} * {}) >> {}({})).astype({})".format(*factors, wide, t[1:], numpy_type(t))
    if part[0] == "mad":
        code += f" + {e.src(a[3], kind)}"
    return e.set(a[0], code, kind)


def logical(e, part, t, a):
    root = part[0]
    if root == "setp":
        return _comparison(e, part, t, a)
    if root == "selp":
        return e.set(a[0], f"where({e.src(a[3], 'pred')}, {e.sources(a[1:3], bits(t))})", bits(t))
    if root in ("and", "or", "xor"):
        x, y = (e.src(o, t) for o in a[1:3])
        return e.set(a[0], f"{x} {dict(zip(('and', 'or', 'xor'), '&|^'))[root]} {y}", t)
    if root == "not":
        return e.set(a[0], f"~{e.src(a[1], t)}", t)
    if root in ("shl", "shr"):
        kind, name = (bits(t), "shift_left") if root == "shl" else (t, "shift_right")
        return e.set(a[0], f"{name}({e.src(a[1], kind)}, {e.src(a[2], 'b32')})", kind)
    if root == "shf":
        return e.set(a[0], f"funnel({part[1]!r}, {part[2] == 'wrap'}, {e.sources(a[1:4], 'b32')})", "b32")
    if root == "bfe":
        return e.set(a[0], f"bfe({e.src(a[1], t)}, {e.sources(a[2:4], 'b32')})", t)
    if root == "bfi":
        return e.set(a[0], f"bfi({e.sources(a[1:3], t)}, {e.sources(a[3:5], 'b32')})", t)
    if root == "prmt" and t == "b32":
        return e.set(a[0], f"prmt({e.sources(a[1:4], 'b32')})", "b32")
    if root == "lop3":
        return e.set(a[0], f"lop3({e.sources(a[1:5], 'b32')})", "b32")
    if root in ("popc", "clz", "brev", "bfind"):
        return e.set(a[0], f"{root}({e.src(a[1], bits(t))})", "b32")
    return None


def _comparison(e, part, t, a):
    how = part[1]
    x, y = e.src(a[1], t), e.src(a[2], t)
    if "ftz" in part:
        x, y = f"flush({x})", f"flush({y})"
    if how == "num":
        code = f"~(np.isnan({x}) | np.isnan({y}))"
    elif how == "nan":
        code = f"np.isnan({x}) | np.isnan({y})"
    elif t in FLOATS and how == "ne":  # false of NaNs, unlike Python's
        code = f"({x} < {y}) | ({x} > {y})"
    elif t in FLOATS and how == "equ":
        code = f"~(({x} < {y}) | ({x} > {y}))"
    elif t in FLOATS and how in UNORDERED:
        code = f"~({x} {UNORDERED[how]} {y})"
    else:
        code = f"{x} {COMPARE[how]} {y}"
    first, _, second = a[0].partition("|")
    if part[2] in ("and", "or", "xor"):
        if second not in ("", "_"):
            raise Unsupported("setp with two destinations")
        c = ("~" if a[3].startswith("!") else "") + e.src(a[3].lstrip("!"), "pred")
        return e.set(first, f"({code}) {dict(zip(('and', 'or', 'xor'), '&|^'))[part[2]]} {c}", "pred")
    return e.set(first, code, "pred") + (e.set(second, f"~({code})", "pred") if second else [])


def conversion(e, part, t, a):
    if part[0] != "cvt":
        return None
    to, source, how = part[-2], part[-1], set(part[1:-2])
    if to in PACKED:
        if "rn" not in how or how & {"satfinite", "relu"}:
            raise Unsupported(".".join(part))
        name = {"bf16x2": "to_bf16", "f16x2": "to_f16"}[to]
        high, low = (f"{name}({e.src(x, 'f32')})" for x in a[1:3])
        return e.set(a[0], f"({high}.astype(u4) << u4(16)) | {low}", "b32")
    x = e.src(a[1], source)
    if "ftz" in how and source == "f32":
        x = f"flush({x})"
    whole = next((ROUND[h] for h in how if h in ROUND), None)
    if to == "tf32":
        return e.set(a[0], f"to_tf32({x}, {sorted(how)!r})", "f32")
    if source in FLOATS and to in FLOATS:
        x = f"{whole}({x})" if whole else x
        x = f"saturate({x})" if "sat" in how else x
        if how & {"rz", "rm", "rp"} or (to == "bf16" and "rn" not in how):
            raise Unsupported(".".join(part))
        if to == "bf16":
            return e.set(a[0], f"{x}.astype(f4)" if source == "f64" else x, "bf16")
        return e.set(a[0], f"({x}).astype({numpy_type(to)})", to)
    if to in FLOATS:  # from an integer
        if to == "bf16" or "rn" not in how:
            raise Unsupported(".".join(part))
        return e.set(a[0], f"{x}.astype({numpy_type(to)})", to)
    if source in FLOATS:
        if whole is None:
            raise Unsupported(".".join(part))
        return e.set(a[0], f"to_integer({whole}({x}), {numpy_type(to)})", to)
    if "sat" in how:
        raise Unsupported(".".join(part))
    return e.set(a[0], f"{x}.astype({numpy_type(to)})", to)
