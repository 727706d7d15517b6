"""Integer and bit arithmetic of PTX on NumPy arrays."""

import numpy as np

from .floats import f8, i8, u4, u8
from .memory import UINT, Fault


def to_integer(x, t):
    info = np.iinfo(t)
    wide = np.where(np.isnan(x), 0, x.astype(f8))
    inside = np.clip(wide, float(info.min), float(info.max))
    result = np.where(wide >= float(info.max), info.max, np.where(wide <= float(info.min), info.min, 0)).astype(t)
    middle = (wide < float(info.max)) & (wide > float(info.min))
    return np.where(middle, np.where(middle, inside, 0).astype(i8).astype(t), result)


def high64(x, y):
    signed = np.asarray(x).dtype.kind == "i"
    x, y = np.broadcast_arrays(x, y)
    return np.array([(int(p) * int(q)) >> 64 for p, q in zip(x, y)], i8 if signed else u8)


def divide(x, y, remainder, mask):
    x, y = np.broadcast_arrays(x, y)
    zero = y == 0
    if (zero if mask is None else zero & mask).any():
        raise Fault("integer division by zero")
    y = np.where(zero, y.dtype.type(1), y)
    if x.dtype.kind == "i":
        wide = i8 if x.dtype.itemsize < 8 else object
        a, b = x.astype(wide), y.astype(wide)
        q = abs(a) // abs(b) * np.where((a < 0) == (b < 0), 1, -1)
    else:
        a, b, q = x, y, x // y
    return (a - q * b if remainder else q).astype(x.dtype)


def shift_left(x, n):
    x = np.asarray(x)
    bits = 8 * x.dtype.itemsize
    n = np.asarray(n)
    return np.where(n < bits, x << np.minimum(n, bits - 1).astype(x.dtype), x.dtype.type(0))


def shift_right(x, n):
    x = np.asarray(x)
    bits = 8 * x.dtype.itemsize
    n = np.asarray(n)
    shifted = x >> np.minimum(n, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(n < bits, shifted, x.dtype.type(0))


def funnel(side, wrap, low, high, n):
    n = (n & u4(31)) if wrap else np.minimum(n, u4(32))
    both = (np.asarray(high).astype(u8) << u8(32)) | low
    return (both >> n.astype(u8)).astype(u4) if side == "r" else ((both << n.astype(u8)) >> u8(32)).astype(u4)


def bfe(x, position, length):
    bits = 8 * x.dtype.itemsize
    position, length = int(np.ravel(position)[0]), int(np.ravel(length)[0])  # immediates
    assert 0 < length and position + length <= bits
    signed = x.dtype.kind == "i"
    x = x.view(f"u{x.dtype.itemsize}") << x.dtype.type(bits - position - length).astype(f"u{x.dtype.itemsize}")
    x = x.view(f"i{x.dtype.itemsize}") if signed else x
    return x >> x.dtype.type(bits - length)


def bfi(x, y, position, length):
    assert np.ndim(position) == 0 and np.ndim(length) == 0
    t = np.asarray(y).dtype.type
    m = t(((1 << int(length)) - 1) << int(position) & (2 ** (8 * y.dtype.itemsize) - 1))
    return (y & ~m) | ((x << t(position)) & m)


def prmt(x, y, selector):
    both = np.asarray(x).astype(u8) | (np.asarray(y).astype(u8) << u8(32))
    result = u4(0)
    for i in range(4):
        s = (np.asarray(selector) >> u4(4 * i)) & u4(15)
        byte = (both >> ((s & u4(7)) * u4(8)).astype(u8)).astype(u4) & u4(255)
        byte = np.where((s & u4(8)) != 0, np.where((byte & u4(128)) != 0, u4(255), u4(0)), byte)
        result = result | (byte << u4(8 * i))
    return result


def lop3(x, y, z, table):
    result = u4(0)
    for i in range(8):
        if int(table) >> i & 1:
            result = result | ((x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z))
    return result


def popc(x):
    return np.bitwise_count(x).astype(u4)


def clz(x):
    bits = 8 * x.dtype.itemsize
    return np.array([bits - int(v).bit_length() for v in x], u4)


def brev(x):
    return np.array([int(f"{int(v):032b}"[::-1], 2) for v in x], u4)


def bfind(x):
    return np.array([(int(v).bit_length() - 1) & 0xFFFFFFFF for v in x], u4)


def unpack(x, n):
    """Parts, the lowest first."""
    size = x.dtype.itemsize // n
    return np.ascontiguousarray(np.ascontiguousarray(x).view(UINT[size]).reshape(-1, n).T)


def pack(parts, n):
    size = parts[0].dtype.itemsize
    stacked = np.stack([np.broadcast_to(p, n) for p in parts], 1)
    return stacked.view(UINT[size * len(parts)])[:, 0]
