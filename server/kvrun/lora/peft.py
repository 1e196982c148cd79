"""What an adapter's `adapter_config.json` says, read whole: a field that would change the answer and is not served is refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvrun.errors import AdapterError

# Fields that say how the adapter was trained or found, not what it computes.
SILENT = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out",
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config",
    "megatron_core", "qalora_group_size", "ensure_weight_tying", "bias",
}  # fmt: skip
READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters"}
# Initialisations that also move the base weights: what was saved does not belong to the base as published.
MOVES_BASE = re.compile(r"pissa|olora|corda|lora_ga|loftq")


@dataclass(frozen=True)
class PeftConfig:
    """Rank and scale of every module of one adapter."""

    r: int
    alpha: float
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()  # full names or their ends, of parameters that are changed as such

    @classmethod
    def parse(cls, text: bytes) -> PeftConfig:
        """Read the file's content. Raises AdapterError naming the field at fault."""
        try:
            fields = json.loads(text)
            kind = fields.get("peft_type")
        except (ValueError, AttributeError) as error:
            raise AdapterError(f"adapter_config.json is not a JSON object: {error}") from error
        if kind != "LORA":
            raise AdapterError(f"adapter_config.json: peft_type is {kind!r}; only LORA is served")
        for name, value in fields.items():
            _refuse(name, value)
        try:
            return cls(
                r=int(fields["r"]),
                alpha=float(fields["lora_alpha"]),
                rslora=bool(fields.get("use_rslora")),
                rank_pattern={key: int(rank) for key, rank in (fields.get("rank_pattern") or {}).items()},
                alpha_pattern={key: float(alpha) for key, alpha in (fields.get("alpha_pattern") or {}).items()},
                parameters=tuple(fields.get("target_parameters") or ()),
            )
        except KeyError as error:
            raise AdapterError(f"adapter_config.json lacks {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise AdapterError(f"adapter_config.json: rank or alpha is not a number: {error}") from error

    def rank(self, module: str) -> int:
        """The rank that the config gives to a module."""
        return _first_match(self.rank_pattern, module, self.r)

    def names(self, parameter: str) -> bool:
        """Whether a parameter is changed as such."""
        return any(parameter == name or parameter.endswith(f".{name}") for name in self.parameters)

    def scale(self, module: str) -> float:
        """What B A x is multiplied with at a module."""
        rank, alpha = self.rank(module), _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _first_match(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that, as a regular expression, matches the end of a module's or a parameter's name at a dot."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})(\.weight)?$", module):
                return value
        except re.error as error:
            raise AdapterError(f"adapter_config.json: pattern {key!r} is no regular expression: {error}") from error
    return default


def _refuse(name: str, value: Any) -> None:
    if name == "init_lora_weights" and isinstance(value, str) and MOVES_BASE.match(value):
        raise AdapterError(f"adapter_config.json: init_lora_weights={value!r} changed the base weights too; save it as plain LoRA")
    if name == "bias" and value != "none":
        raise AdapterError(f"adapter_config.json: bias={value!r} is not served; train with bias='none'")
    if name not in SILENT | READ and value:
        shown = str(value) if len(str(value)) <= 60 else f"{str(value)[:60]}..."
        raise AdapterError(f"adapter_config.json: {name}={shown} is not served; nothing of an adapter is ever ignored")
