"""A typed reader of `config.json` and `generation_config.json`: one spelling for what families and versions spell differently."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kvrun.errors import ConfigError, FilesError, Unsupported
from kvrun.spec.positions import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)

ALIASES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "layer_norm_eps": ("layer_norm_epsilon", "norm_epsilon"),
    "hidden_act": ("hidden_activation", "activation_function", "activation"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "model_max_length", "n_ctx"),
    "dtype": ("torch_dtype",),
    "rope_theta": ("rotary_emb_base",),
    "partial_rotary_factor": ("rotary_pct",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
}
Scalar = Any  # what JSON holds: a number, a text, a list, a mapping


class Config:
    """The fields of one model's config. A field that is absent and a field that is null are the same thing."""

    def __init__(
        self,
        fields: Mapping[str, Any],
        where: str = "config.json",
        generation: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.fields = fields
        self.where = where  # the file, for messages
        self.generation = generation or {}
        self.folder = folder  # where other files of the model lie

    @classmethod
    def read(cls, folder: str | Path) -> Config:
        """Read a model folder. FilesError when config.json is missing or is not a JSON object."""
        path = Path(folder) / "config.json"
        beside = Path(folder) / "generation_config.json"
        return cls(json_object(path), str(path), json_object(beside) if beside.is_file() else None, Path(folder))

    def get(self, key: str, default: Scalar = None) -> Scalar:
        """The field under its own name or an alias of it, or the default."""
        for name in (key, *ALIASES.get(key, ())):
            if self.fields.get(name) is not None:
                return self.fields[name]
        return default

    def otherwise(self, **fields: Scalar) -> Config:
        """The same config, with these for the fields that it leaves out; files often say only what differs from their class."""
        absent = {key: value for key, value in fields.items() if not self.fields.keys() & {key, *ALIASES.get(key, ())}}
        return Config({**self.fields, **absent}, self.where, self.generation, self.folder)

    def stating(self, **fields: Scalar) -> Config:
        """The same config, with these in place of what it says."""
        return Config({**self.fields, **fields}, self.where, self.generation, self.folder)

    def __getattr__(self, key: str) -> Scalar:
        if key.startswith("__"):  # copying and pickling ask for these; they are not fields
            raise AttributeError(key)
        value = self.get(key)
        if value is None:
            names = " or ".join((key, *ALIASES.get(key, ())))
            found = ", ".join(sorted(self.fields)[:40]) or "no fields"
            raise ConfigError(f"{self.where}: the field {names} is missing; found {found}")
        return value

    def only(self, key: str, *served: Scalar) -> None:
        """Refuse a field that is stated and holds anything else than these values. Raises Unsupported."""
        value = self.get(key)
        if value is not None and value not in served:
            raise Unsupported(f"{self.where}: {key} {value!r} is not served; known are {', '.join(map(repr, served))}")

    def within(self, key: str) -> Config:
        """The fields of a mapping in this config, as a config of its own; empty when there is none."""
        return Config(self.get(key) or {}, f"{self.where}: {key}", self.generation, self.folder)

    @property
    def architecture(self) -> str:
        """The first entry of `architectures`."""
        names = self.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise ConfigError(f"{self.where}: the field architectures must be a list that names the model's class; found {names!r}")
        return names[0]

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer: the union of both files' `eos_token_id` and of an inner language model's, sorted."""
        ids: set[int] = set()
        inner = (self.get("text_config") or {}).get("eos_token_id")
        for value in (self.get("eos_token_id"), self.generation.get("eos_token_id"), inner):
            ids.update(value if isinstance(value, list) else [] if value is None else [value])
        return tuple(sorted(ids))

    @property
    def head_dim(self) -> int:
        """Width of one attention head, stated or derived."""
        return self.get("head_dim") or self.hidden_size // self.num_attention_heads

    def slides(self, layer: int, every: int) -> bool:
        """Whether a layer sees its window only: as `layer_types` says, or all but each `every`-th, unless the file counts otherwise."""
        types = self.get("layer_types")
        if types is not None:
            return bool(types[layer] == "sliding_attention")
        pattern = self.get("sliding_window_pattern", every)  # a number, or a letter for each layer: "LLLG"
        if isinstance(pattern, str):
            return pattern[layer % len(pattern)] == "L"
        return pattern > 0 and (layer + 1) % pattern != 0

    def rope(self, head_dim: int, style: Literal["half", "interleaved"] = "half", *, layers: str | None = None) -> Rope:
        """The rotary embedding of heads of this width, from either spelling of its parameters.

        `layers` names the type of layer asked for in a family whose types rotate differently. Older files stretch only the
        layers that see everything, and state a base of its own for those that do not.
        """
        parameters = self.get("rope_parameters") or {}
        stated: dict[str, Any] = {**(self.get("rope_scaling") or {}), **(parameters.get(layers) or parameters)}
        theta = stated.get("rope_theta") or self.get("rope_theta", 10_000.0)
        if layers == "sliding_attention" and layers not in parameters:
            stated, theta = {}, self.get("rope_local_base_freq", theta)
        dim = int(head_dim * (stated.get("partial_rotary_factor") or self.get("partial_rotary_factor", 1.0)))
        scaling = self._scaling(stated)
        if isinstance(scaling, LongRopeScaling) and {len(scaling.short_factor), len(scaling.long_factor)} != {dim // 2}:
            found = f"found {len(scaling.short_factor)} and {len(scaling.long_factor)}"
            raise ConfigError(f"{self.where}: rope scaling longrope needs {dim // 2} numbers in short_factor and in long_factor; {found}")
        return Rope(dim, float(theta), scaling, style)

    def _scaling(self, stated: Mapping[str, Any]) -> RopeScaling | None:
        kind = stated.get("rope_type") or stated.get("type") or "default"

        def number(key: str, default: float | None = None) -> float:
            value = stated.get(key)
            value = default if value is None else value
            if value is None:
                raise ConfigError(f"{self.where}: rope scaling {kind} needs the field {key}; found {', '.join(sorted(stated))}")
            return float(value)

        original = int(self.get("original_max_position_embeddings") or stated.get("original_max_position_embeddings") or 0)
        if kind == "default":
            return None
        if kind == "linear":
            return LinearScaling(number("factor"))
        if kind == "dynamic":
            return DynamicScaling(number("factor"))
        original = original or self.max_position_embeddings
        stretched = self.max_position_embeddings / original
        if kind == "llama3":
            return Llama3Scaling(number("factor"), number("low_freq_factor"), number("high_freq_factor"), original)
        if kind == "yarn":
            factor = number("factor", stretched)
            slow_and_fast = number("beta_fast", 32.0), number("beta_slow", 1.0)
            return YarnScaling(factor, original, _yarn_attention(factor, stated), *slow_and_fast, bool(stated.get("truncate", True)))
        if kind in ("longrope", "su"):
            factor = number("factor", stretched)
            derived = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
            attention = number("attention_factor", derived)
            short, long = (tuple(map(float, stated.get(key) or ())) for key in ("short_factor", "long_factor"))
            return LongRopeScaling(short, long, original, number("short_mscale", attention), number("long_mscale", attention))
        known = "default, linear, dynamic, llama3, yarn, longrope"
        raise Unsupported(f"{self.where}: rope scaling {kind} is not served; known are {known}")


def _yarn_attention(factor: float, stated: Mapping[str, Any]) -> float:
    def magnitude(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if stated.get("attention_factor") is not None:
        return float(stated["attention_factor"])
    if stated.get("mscale") and stated.get("mscale_all_dim"):
        return magnitude(stated["mscale"]) / magnitude(stated["mscale_all_dim"])
    return magnitude(1.0)


def json_object(path: Path) -> dict[str, Any]:
    """A file's JSON object. FilesError when it is missing or holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FilesError(f"{path} is missing; a model folder holds config.json, *.safetensors and tokenizer.json") from None
    except (OSError, ValueError) as error:
        raise FilesError(f"{path} cannot be read as JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise FilesError(f"{path} must hold a JSON object; found {type(value).__name__}")
    return value
