"""The config.json that a GGUF file's metadata stand for."""

from __future__ import annotations

import math
from typing import Any

from kvrun.errors import FilesError, Unsupported
from kvrun.gguf.architecture import Architecture, Config
from kvrun.gguf.container import PLAIN, Container
from kvrun.gguf.names import places

METHOD = "gguf"  # as `--quantize` calls it
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Bits that a number takes in memory, where codes have 4 or 8, and scales and offsets 16, or 8 beside what blocks share.
HELD_BITS = {
    "Q4_0": 4.5,
    "Q4_1": 5.0,
    "Q5_0": 8.5,
    "Q5_1": 9.0,
    "Q8_0": 8.5,
    "Q2_K": 5.125,
    "Q3_K": 4.5625,
    "Q4_K": 4.625,
    "Q5_K": 8.625,
    "Q6_K": 8.5625,
    "IQ4_NL": 4.5,
    "IQ4_XS": 4.3125,
}
# Tokens that end a turn wherever a vocabulary has them, whatever the file says of its end token.
ENDS_OF_TURN = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
)
SPECIAL = (3, 4)  # types of tokens: those that control, and those that a person defined


def config_of(container: Container, architecture: Architecture) -> Config:
    """The fields of config.json."""
    metadata, prefix = container.metadata, container.architecture
    config: Config = {"architectures": [architecture.serves], **architecture.states}
    for name, key in architecture.keys.items():
        value = metadata.get(f"{prefix}.{key}")
        if value is not None:
            config[name] = _one(container, key, value)
    config["vocab_size"] = _embedding(container)[0]
    config["tie_word_embeddings"] = "output.weight" not in container.tensors
    if architecture.derive is not None:
        config.update(architecture.derive(container, config))
    config.update(_rotation(container, architecture, config))
    config.update(tokens(container), dtype=_dtype(container), quantization_config=_stored(container, architecture))
    return config


def tokens(container: Container) -> Config:
    """The ids of special tokens."""
    named = {"bos_token_id": "bos", "pad_token_id": "padding"}
    found: Config = {
        field: container.metadata[f"tokenizer.ggml.{name}_token_id"]
        for field, name in named.items()
        if f"tokenizer.ggml.{name}_token_id" in container.metadata
    }
    ends = {container.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")} - {None}
    texts = container.metadata.get("tokenizer.ggml.tokens", [])
    for id, kind in enumerate(container.metadata.get("tokenizer.ggml.token_type", [])):
        if kind in SPECIAL and texts[id] in ENDS_OF_TURN:
            ends.add(id)
    return {**found, "eos_token_id": sorted(ends)} if ends else found


def _one(container: Container, key: str, value: Any) -> Any:
    """A number that files may also state for each layer."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise Unsupported(f"{container.file}: {key} differs from layer to layer, which is not served; serve the original checkpoint")
    return value[0]


def _embedding(container: Container) -> tuple[int, ...]:
    if "token_embd.weight" not in container.tensors:
        raise FilesError(f"{container.file} holds no token_embd.weight; it is a part of a model, name the file with its layers")
    return container.tensors["token_embd.weight"].shape


def _rotation(container: Container, architecture: Architecture, config: Config) -> Config:
    """How much of a head is rotated, and how the rotation is stretched."""
    found: Config = {}
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rotated = container.metadata.get(f"{container.architecture}.rope.dimension_count", dim)
    if "head_dim" not in config and "pairs" in architecture.orders.values():
        # Where rows lie in pairs all of a head is rotated, so that this says how wide one is.
        found["head_dim"] = dim = rotated
    if rotated != dim:
        found["partial_rotary_factor"] = rotated / dim
    scaling = {**_factors(container, config), **_stretched(container)}
    return {**found, "rope_scaling": scaling} if scaling else found


def _factors(container: Container, config: Config) -> Config:
    """Divisors of each frequency, stored as tensors: one list for all sequences, or one for short and one for long ones."""
    if "rope_freqs.weight" in container.tensors:
        factors = container.numbers("rope_freqs.weight")
        span = config["max_position_embeddings"]
        same = {"short_factor": factors, "long_factor": factors}
        return {"rope_type": "longrope", **same, "original_max_position_embeddings": span, "attention_factor": 1.0}
    if "rope_factors_long.weight" not in container.tensors:
        return {}
    both = {f"{length}_factor": container.numbers(f"rope_factors_{length}.weight") for length in ("short", "long")}
    factor = container.metadata.get(f"{container.architecture}.rope.scaling.attn_factor")
    original = container.field("{arch}.rope.scaling.original_context_length")
    said = {} if factor is None else {"attention_factor": factor}
    return {"rope_type": "longrope", **both, "original_max_position_embeddings": original, **said}


def _stretched(container: Container) -> Config:
    """Scalings that are numbers."""
    at = "{arch}.rope.scaling."
    kind = container.field(f"{at}type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": container.field(f"{at}factor")}
    if kind == "yarn":
        names = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        keys = {field: f"{container.architecture}.rope.scaling.{name}" for field, name in names.items()}
        stated = {field: container.metadata[key] for field, key in keys.items() if key in container.metadata}
        original = container.field(f"{at}original_context_length")
        multiplier = container.metadata.get(f"{container.architecture}.rope.scaling.yarn_log_multiplier")
        if multiplier is not None:  # a tenth of what DeepSeek's configs say twice
            stated |= dict.fromkeys(("mscale", "mscale_all_dim"), round(10 * multiplier, 6))
        return {"rope_type": "yarn", "factor": container.field(f"{at}factor"), "original_max_position_embeddings": original, **stated}
    if kind not in ("none", "longrope"):
        raise Unsupported(f"{container.file}: rope scaling {kind} is not served; known are none, linear, yarn and longrope")
    return {}


def _dtype(container: Container) -> str:
    """What the model computes in: the type of its plain matrices, bfloat16 where they are coded."""
    kinds = {tensor.type.name for tensor in container.tensors.values() if len(tensor.shape) > 1}
    coded = kinds - set(PLAIN)
    # Routers and the like stay F32 in files of any type.
    plain = kinds - {"F32"} or kinds
    return DTYPES[min(plain)] if not coded and len(plain) == 1 else "bfloat16"


def _stored(container: Container, architecture: Architecture) -> Config:
    """What plans before anything is loaded go by: the share of matrices that is coded, and the bits that a number of them takes."""
    matrices = [place for place in places(container, architecture).values() if place.matrix]
    coded = [(math.prod(place.shape), HELD_BITS[name]) for place in matrices if (name := place.tensor.type.name) in HELD_BITS]
    numbers = sum(count for count, _ in coded)
    bits = sum(count * bits for count, bits in coded) / max(numbers, 1)
    share = numbers / sum(math.prod(place.shape) for place in matrices)
    return {"quant_method": METHOD, "coded_share": round(share, 4), "held_bits": round(bits, 3)}
