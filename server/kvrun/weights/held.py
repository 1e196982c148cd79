"""How much memory the weights of linears take in a format, without its code: what plans before anything is loaded go by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvrun.weights.plan import ModelPlan

# Bits that a number takes with its share of scales.
MADE = {"int8": 8.1, "eetq": 8.1, "bitsandbytes": 8.1, "fp8": 8.1, "int4": 4.5, "bitsandbytes-nf4": 4.5, "bitsandbytes-fp4": 4.5}
HEADED = ("int8", "int4")  # methods that make the output matrix int8
HEAD = "kvrun_head"  # where a checkpoint's quantization_config says that its plain output matrix is to be served in this method's codes
SCALE_AND_ZERO = 24  # bits at most, of each group


def method(quantize: str | None, stored: Mapping[str, Any] | None) -> str:
    """The name of the format that is served: the one asked for, the checkpoint's own, or "" for plain weights."""
    return quantize or (str(stored.get("quant_method") or "compressed-tensors") if stored else "")


def weight_bytes(plan: ModelPlan, item: int, quantize: str | None, stored: Mapping[str, Any] | None) -> int:
    """Bytes that this rank's weights will take, `item` for each number that stays plain. An estimate where scales vary."""
    if stored and "held_bits" in stored:
        return _mixed(plan, item, float(stored["coded_share"]), float(stored["held_bits"]))
    bits = _stored_bits(stored) if stored else MADE.get(quantize or "")
    if bits is None:
        return plan.elements * item
    coded = sum(linear.out_features * linear.in_features for linear in plan.linears if linear.role != "whole")
    plain, head = plan.elements - coded, 0
    if (quantize in HEADED or (stored or {}).get(HEAD)) and plan.head.weight.rest is None:
        head = plan.head.weight.elements
        plain -= 0 if _tied(plan) else head
    return plain * item + int((coded * bits + head * MADE["int8"]) / 8)


def _mixed(plan: ModelPlan, item: int, share: float, bits: float) -> int:
    """A checkpoint that says which share of its matrices is coded, both ends among them, and with how many bits on average."""
    ends = plan.head.weight.elements + (0 if _tied(plan) else plan.embed.table.elements)
    coded = share * (ends + sum(linear.out_features * linear.in_features for linear in plan.all_linears()))
    return int((plan.elements - coded) * item + coded * bits / 8)


def _tied(plan: ModelPlan) -> bool:
    return plan.head.weight.instead == plan.embed.table.tensor


def _stored_bits(stored: Mapping[str, Any]) -> float:
    """Codes of up to 4 bits take 4 of them, others 8."""
    schemes = [group.get("weights") or {} for group in (stored.get("config_groups") or {}).values()] or [stored]
    found = []
    for scheme in schemes:
        packed = scheme.get("load_in_4bit") or 0 < scheme.get("bits", scheme.get("num_bits", scheme.get("w_bit", 8))) <= 4
        group = scheme.get("group_size", scheme.get("q_group_size", 64))
        found.append((4 if packed else 8) + (SCALE_AND_ZERO / group if group and group > 0 else 0.1))
    return max(found)
