"""Every op by name. Each lives in the folder of its name, with its reference, its native code and its test."""

from kvrun_kernels.act_mul.op import act_mul, activation
from kvrun_kernels.add.op import add_
from kvrun_kernels.causal_conv.op import causal_conv
from kvrun_kernels.grouped import Grouped
from kvrun_kernels.grouped_linear.op import grouped_linear
from kvrun_kernels.grouped_quantized_linear.op import grouped_quantized_linear
from kvrun_kernels.layer_norm.op import layer_norm
from kvrun_kernels.linear.op import PackedLinear, linear, pack_linear, pack_rows
from kvrun_kernels.paged_attention.op import paged_attention
from kvrun_kernels.quantize.op import Scheme, quantize
from kvrun_kernels.quantized_linear.op import CodedRows, PackedQuantized, pack_quantized, pack_quantized_rows, quantized_linear
from kvrun_kernels.rms_norm.op import rms_norm
from kvrun_kernels.rope.op import rope_
from kvrun_kernels.selective_scan.op import selective_scan
from kvrun_kernels.sgmv.op import LoraSegments, Segment, lora, lora_pointers
from kvrun_kernels.sgmv.table import LoraPointers, LoraSites, LoraTable, LoraUse
from kvrun_kernels.ssd_scan.op import ssd_scan
from kvrun_kernels.store_kv.op import store_kv

__all__ = [
    "CodedRows",
    "Grouped",
    "LoraPointers",
    "LoraSegments",
    "LoraSites",
    "LoraTable",
    "LoraUse",
    "PackedLinear",
    "PackedQuantized",
    "Scheme",
    "Segment",
    "act_mul",
    "activation",
    "add_",
    "causal_conv",
    "grouped_linear",
    "grouped_quantized_linear",
    "layer_norm",
    "linear",
    "lora",
    "lora_pointers",
    "pack_linear",
    "pack_quantized",
    "pack_quantized_rows",
    "pack_rows",
    "paged_attention",
    "quantize",
    "quantized_linear",
    "rms_norm",
    "rope_",
    "selective_scan",
    "ssd_scan",
    "store_kv",
]
