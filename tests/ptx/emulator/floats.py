"""Floating-point arithmetic of PTX on NumPy arrays. bf16 numbers are held as float32 and rounded when stored."""

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i4, i8, f2, f4, f8 = np.int32, np.int64, np.float16, np.float32, np.float64

WORST = False  # whether the approximations are as wrong as PTX's documentation allows; `emulated` sets it


def bf16(bits):
    return (np.asarray(bits).astype(u4) << u4(16)).view(f4)


def to_bf16(x):
    """Round to nearest even; the bits."""
    x = np.asarray(x, f4)
    bits = x.view(u4)
    rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
    return np.where(np.isnan(x), u4(0x7FFF), rounded).astype(u2)


def to_f16(x):
    return np.asarray(x, f4).astype(f2).view(u2)


def to_tf32(x, rounding):
    bits = np.asarray(x, f4).view(u4)
    if "rna" in rounding:
        bits = bits + u4(0x1000)
    elif "rn" in rounding:
        bits = bits + u4(0xFFF) + ((bits >> u4(13)) & u4(1))
    return tf32(bits)


def tf32(bits):
    """What a tensor core reads of float32."""
    return (bits & u4(0xFFFFE000)).view(f4)


def decode(bits, t):
    """Registers of uint32 -> float64: pairs of half-precision numbers, or single tf32, in a new last dimension."""
    if t == "tf32":
        return tf32(bits).astype(f8)[..., None]
    if t == "f16":
        return np.ascontiguousarray(bits)[..., None].view(f2).astype(f8)
    return bf16(np.ascontiguousarray(bits)[..., None].view(u2)).astype(f8)


def flush(x):
    return np.where(np.abs(x) < f4(2**-126), np.copysign(f4(0), x), x)


def saturate(x):
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1))


def fma_f32(x, y, z):
    return (np.asarray(x).astype(f8) * y + z).astype(f4)  # rounds twice, of which the first is to 53 bits


fma_bf16 = fma_f32  # rounded to bf16 when stored


def fma_f64(x, y, z):
    return x * y + z


def fma_f16(x, y, z):
    return (x.astype(f8) * y + z).astype(f2)


def halves(name, t, *operands):
    """Two half-precision numbers in each 32 bits."""
    get, put = (bf16, to_bf16) if t == "bf16x2" else (lambda b: b.view(f2).astype(f4), to_f16)
    x = [get(np.atleast_1d(o).view(u2)) for o in operands]
    f = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax, "min_nan": np.minimum,
         "max_nan": np.maximum, "neg": np.negative, "abs": np.abs, "fma": fma_f32, "ex2": np.exp2,
         "tanh": np.tanh}[name]  # fmt: skip
    return put(f(*x)).view(u4)


def pairs(name, n, *operands):
    """Two float32 in each 64 bits."""
    x = [np.ascontiguousarray(np.broadcast_to(o, n)).view(f4) for o in operands]
    return {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma_f32}[name](*x).view(u8)


# The approximations, computed in float64 and rounded; where WORST, then up to `ulps` last bits off.


def _spoilt(x, result, ulps):
    """By a hash of the argument's bits."""
    if not WORST or result.dtype != f4:
        return result
    hashed = np.ascontiguousarray(x).view(u4) * u4(2654435761) >> u4(16)
    off = (hashed % u4(2 * ulps + 1)).astype(i4) - ulps
    usual = np.isfinite(result) & (np.abs(result) > f4(1e-37)) & (result.view(i4) & 0x7FFFFF != 0)
    return np.where(usual, (result.view(i4) + off).view(f4), result)


def _approximation(function, ulps):
    return lambda x: _spoilt(x, function(x.astype(f8)).astype(x.dtype), ulps)


ex2, rsqrt = _approximation(np.exp2, 2), _approximation(lambda x: 1 / np.sqrt(x), 2)
sqrt, rcp = _approximation(np.sqrt, 1), _approximation(lambda x: 1 / x, 1)
lg2, sin, cos, tanh = (_approximation(f, 0) for f in (np.log2, np.sin, np.cos, np.tanh))


def full_divide(x, y):
    return _spoilt(x, x / y, 2)


def approx_divide(x, y):
    """div.approx: 0 for |y| above 2**126, and a NaN where x is then infinite."""
    q = _spoilt(x, x / y, 2)
    large = (np.abs(y) > f4(2**126)) & np.isfinite(y)
    return np.where(large, np.where(np.isinf(x), f4(np.nan), np.copysign(f4(0), q)), q)
