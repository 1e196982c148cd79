"""What the Triton code of the ops shares: products, roundings and numbers of 8 bits, over tiles.

Only a `triton.py` imports this file, so that Triton is loaded where a GPU needs it or a test asks for its interpreter.
"""

import torch
import triton
import triton.language as tl

from kvrun_kernels.stored import FORMATS

# The interpreter has no bfloat16: it multiplies the bits as integers and rounds towards zero. So arithmetic is float32 in every
# kernel, and the two functions below do for the interpreter what the hardware does by itself.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# How a page pool keeps numbers of 8 bits; any other format is a dtype that loads convert.
E4M3, E5M2, INT8 = (tl.constexpr(FORMATS[dtype]) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8))

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def up_to_power(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The power of two at or above n, within bounds: what a tile's side can be."""
    return min(max(triton.next_power_of_2(max(n, 1)), least), most)


@triton.jit
def product(a, b, total):
    """total + a @ b, for a and b of one dtype; sums float32, and float32 inputs are not shortened to tf32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 as the nearest `dtype`, of two the even one."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def e4m3(code):
    """A 256th of what the bits of a float8_e4m3fn stand for, float32, exactly; without hardware for the type, and without its NaN."""
    code = code.to(tl.uint16)
    return (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def widened(held, FORMAT: tl.constexpr):
    """What a pool's numbers stand for, float32, before the scale of int8: the inverse of `narrowed`. 8 bits come as uint8."""
    if FORMAT == E4M3:
        found = tl.where((held & 0x7F) == 0x7F, float("nan"), e4m3(held) * 256.0)
    elif FORMAT == E5M2:
        found = (held.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == INT8:
        found = held.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        found = held.to(tl.float32)
    return found


@triton.jit
def to_whole(x):
    """The nearest whole number, of two the even one, for magnitudes below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def float8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, MOST: tl.constexpr):
    """float32 as the bits of an 8-bit float: the nearest, of two the even one; the largest for what is beyond, NaN if not finite."""
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.minimum(tl.abs(x), MOST)
    held = size.to(tl.uint32, bitcast=True)
    drop: tl.constexpr = 23 - MANTISSA
    normal = ((held + ((1 << (drop - 1)) - 1) + ((held >> drop) & 1)) >> drop) - ((127 - BIAS) << MANTISSA)
    tiny = to_whole(size * (1 << (BIAS - 1 + MANTISSA))).to(tl.uint32)
    code = tl.where(held < ((128 - BIAS) << 23), tiny, normal) | ((bits >> 24) & 0x80)
    return tl.where((bits & 0x7F800000) == 0x7F800000, 0x7F, code).to(tl.uint8)


@triton.jit
def narrowed(x, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """float32 as a pool keeps it, 8-bit floats as uint8; `stored.narrow` says how. Not for int8, whose rows share a scale."""
    if FORMAT == E4M3:
        found = float8(x, 3, 7, 448.0)
    elif FORMAT == E5M2:
        found = float8(x, 2, 15, 57344.0)
    else:
        found = rounded(x, DTYPE)
    return found


@triton.jit
def owner(starts, owners, block, ROWS: tl.constexpr):
    """Which of several runs of rows, run n being starts[n] to starts[n + 1], a block of rows belongs to, and the block's first row.

    Run n owns blocks starts[n] // ROWS + n and on, up to the next one's: enough for all of its rows, though not all have any.
    So a grid of starts[-1] // ROWS + owners blocks serves every division of the rows, which the host need not know.
    """
    low = block * 0
    high = low + owners
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(starts + middle) // ROWS + middle <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    first = tl.load(starts + low)
    return low, first + (block - first // ROWS - low) * ROWS


@triton.jit
def softplus(x):
    """log(1 + exp(x)), float32, without an overflow."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
