"""Adapters of parameters that hold many matrices, as PEFT changes all experts of a layer at once.

PEFT names such a change after the module that owns the parameter. Where it changes several parameters of one module, it
wraps the module once for each, the last one outermost: `experts.base_layer` is then the first, `experts` the second.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from kvrun.lora.peft import PeftConfig
from kvrun.lora.sites import Alias, Site

OWNER = re.compile(r"^(?:base_model\.model\.)?(?P<owner>.+?)(?P<wraps>(?:\.base_layer)*)(?P<side>\.lora_[AB](?:\.default)?\.weight)$")


def named(tensors: Mapping[str, Tensor], linears: Iterable[Site], config: PeftConfig) -> dict[str, Tensor]:
    """The tensors, those of parameters by the parameter's own name: "experts.gate_up_proj.lora_A.weight"."""
    parameters: dict[str, list[str]] = {}
    for alias in (source.alias for linear in linears for source in linear.sources if source.alias is not None):
        owned = parameters.setdefault(alias.parameter.rpartition(".")[0], [])
        if alias.parameter not in owned:
            owned.append(alias.parameter)
    # A module with a weight of its own may have been changed as a module: its tensors have the same names.
    changed = {o: [name for name in owned if config.names(name) or name == f"{o}.weight"] for o, owned in parameters.items()}
    found = {}
    for name, tensor in tensors.items():
        match = OWNER.match(name)
        order = changed.get(match["owner"], []) if match else []
        wraps = match["wraps"].count(".base_layer") if match else 0
        # The parameter wrapped first lies deepest; a depth that no parameter has keeps its name, which then fits nothing.
        found[f"{order[-1 - wraps]}{match['side']}" if match and wraps < len(order) else name] = tensor
    return found


def of_one(a: Tensor, b: Tensor, alias: Alias, rank: int) -> tuple[Tensor, Tensor]:
    """One matrix's share of a parameter's change: A lies matrix by matrix, B rank by rank.

    a [count * rank, in] · b [out, rank * count] -> [rank, in], [rows from `first` on, rank]
    """
    mine = slice(alias.index * rank, (alias.index + 1) * rank)
    return a[mine], b.unflatten(1, (rank, alias.count))[alias.first :, :, alias.index]
