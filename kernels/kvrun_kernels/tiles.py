"""What the Triton code of the ops shares: products, roundings and numbers of 8 bits, over tiles.

Only a `triton.py` imports this file, so that Triton is loaded where a GPU needs it or a test asks for its interpreter.
"""

import torch
import triton
import triton.language as tl

# The interpreter has no bfloat16: it multiplies the bits as integers and rounds towards zero. So arithmetic is float32 in every
# kernel, and the two functions below do for the interpreter what the hardware does by itself.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

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
