"""Every op by name. Each lives in the folder of its name, with its reference, its native code and its test."""

from kvrun_kernels.act_mul.op import act_mul, activation
from kvrun_kernels.layer_norm.op import layer_norm
from kvrun_kernels.linear.op import PackedLinear, linear, pack_linear
from kvrun_kernels.paged_attention.op import paged_attention
from kvrun_kernels.rms_norm.op import rms_norm
from kvrun_kernels.rope.op import rope_
from kvrun_kernels.sgmv.op import LoraSegments, Segment, lora
from kvrun_kernels.store_kv.op import store_kv

__all__ = [
    "LoraSegments",
    "PackedLinear",
    "Segment",
    "act_mul",
    "activation",
    "layer_norm",
    "linear",
    "lora",
    "pack_linear",
    "paged_attention",
    "rms_norm",
    "rope_",
    "store_kv",
]
