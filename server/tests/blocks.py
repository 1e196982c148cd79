"""Writes GGUF files of tiny checkpoints with the format's own package: any row of `tiny.ROWS` that files exist for, in any type.

Rows of matrices are moved by reshapes here, which the reader undoes by indices.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from kvrun.gguf import prepared
from kvrun.gguf.architecture import Architecture, architecture_of
from kvrun.gguf.container import Container
from kvrun.spec import Config
from safetensors.torch import load_file

Kinds = Callable[[str, tuple[int, ...]], str]
NAMES = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3", "cohere": "command-r", "gpt_neox": "gptneox"}
NAMES |= {"mistral": "llama", "mixtral": "llama", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2"}
# Types that the package reads and does not write, with the bytes at which a block has its halves.
RANDOM = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,)}


def all_of(kind: str) -> Kinds:
    """Every matrix in one type."""
    return lambda name, shape: kind


FLOATS = all_of("F32")


def write_gguf(checkpoint: Path, file: Path, kinds: Kinds = FLOATS, *, early: bool = False, **metadata: object) -> dict[str, torch.Tensor]:
    """Write a checkpoint as a GGUF file; `kinds` says the type of a matrix by its name there. `early`: as the first converters did.

    Returns what the file stands for under the checkpoint's names, by the package's own reading.
    """
    stated = json.loads((checkpoint / "config.json").read_text())
    stated |= stated.get("text_config", {})
    name = NAMES.get(stated["model_type"], stated["model_type"])
    writer = gguf.GGUFWriter(file, name)
    table = architecture_of(Container(file, {"general.architecture": name}, {}, ()))
    fields = Config(stated)
    for key, value in {**_fields(table, fields), **_vocabulary(checkpoint), **metadata}.items():
        _add(writer, key, value)
    stands: dict[str, torch.Tensor] = {}
    tensors = load_file(checkpoint / "model.safetensors")
    if table.name == "deepseek2":
        fields_of_heads, tensors = _latent(fields, tensors, early)
        for key, value in fields_of_heads.items():
            _add(writer, key, value)
    for stored, names in _stored(table, tensors, fields).items():
        parts = [_moved(table, stored, tensors[part].float(), fields) for part in names]
        whole = (parts[0] if len(parts) == 1 and "_exps" not in stored and "_norm.w" not in stored[-8:] else torch.stack(parts)).numpy()
        if stored.endswith("ffn_gate_inp_shexp.weight"):
            whole = whole[0]
        plain = whole.ndim == 1 or re.search(r"norm|position_embd|gate_inp", stored)
        kind = gguf.GGMLQuantizationType["F32" if plain else kinds(stored, whole.shape)]
        blocks = _blocks(whole, kind)
        writer.add_tensor(stored, blocks, raw_dtype=kind)
        # float32 is no block: the package has nothing to say of it.
        read = torch.from_numpy(whole if kind.name == "F32" else dequantize(blocks, kind).reshape(whole.shape))
        back = [_back(table, stored, part, fields) for part in (read if len(names) > 1 else read.reshape(1, *parts[0].shape))]
        stands |= dict(zip(names, back, strict=True))
    stands = _together(stands)
    for stored, factors in _rotations(fields).items():
        writer.add_tensor(stored, np.array(factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stands


def served(checkpoint: Path, at: Path, kinds: Kinds = FLOATS, **metadata: object) -> Path:
    """The model folder of a checkpoint's GGUF file."""
    write_gguf(checkpoint, at / "model.gguf", kinds, **metadata)
    return prepared(at / "model.gguf", at / "cache")


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif value is not None:
        writer.add_array(key, value)


def _fields(table: Architecture, c: Config) -> dict[str, object]:
    found = {key: c.get(name) for name, key in table.keys.items()}
    found["feed_forward_length"] = c.get("intermediate_size") or 4 * c.hidden_size
    found["attention.head_count_kv"] = c.get("num_key_value_heads") if not c.get("multi_query") or c.get("new_decoder_architecture") else 1
    parameters = c.get("rope_parameters") or {}
    full = parameters.get("full_attention", parameters)
    dim = c.head_dim
    partial = full.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0
    found["rope.dimension_count"] = int(dim * partial)
    found["rope.freq_base"] = float(full["rope_theta"]) if "rope_theta" in full else None
    if "sliding_attention" in parameters:
        found["rope.freq_base_swa"] = float(parameters["sliding_attention"]["rope_theta"])
        found["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in c.layer_types]
    if full.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": full["rope_type"], "rope.scaling.factor": float(full["factor"])}
        found["rope.scaling.original_context_length"] = full.get("original_max_position_embeddings")
    if full.get("rope_type") == "longrope":
        original = full["original_max_position_embeddings"]
        attention = (1 + np.log(c.max_position_embeddings / original) / np.log(original)) ** 0.5
        found |= {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": float(attention)}
    if (window := c.get("sliding_window")) is not None and "attention.sliding_window" in (*table.keys.values(),):
        found["attention.sliding_window"] = window
    if table.name == "phi3":
        found["attention.sliding_window"] = window or 0
    return {f"{table.name}.{key}": value for key, value in found.items() if value is not None}


def _latent(c: Config, tensors: dict[str, torch.Tensor], early: bool) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Fields of latent attention, and the tensors with each head's keys, turned round, and values apart, which early files had not."""
    plain, rotated, value, latent = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
    lengths = {"key_length": plain + rotated, "value_length": value}
    found: dict[str, object] = {"expert_gating_func": 2 if c.model_type == "deepseek_v3" else 1}
    if early:
        found = {f"attention.{name}": length for name, length in lengths.items()}
    else:
        found |= {"attention.key_length": latent + rotated, "attention.value_length": latent}
        found |= {f"attention.{name}_mla": length for name, length in lengths.items()}
    if (all_dim := (c.get("rope_parameters") or {}).get("mscale_all_dim")) is not None:
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * all_dim
    apart: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if "kv_b_proj" not in name or early:
            apart[name] = tensor
            continue
        keys, values = tensor.unflatten(0, (-1, plain + value)).split([plain, value], 1)
        module = name.removesuffix(".weight")
        apart |= {f"{module}.keys.weight": keys.transpose(1, 2).contiguous(), f"{module}.values.weight": values.contiguous()}
    return {f"deepseek2.{key}": value for key, value in found.items()}, apart


def _together(stands: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys and values as the checkpoint has them."""
    found = {}
    for name, tensor in stands.items():
        if name.endswith(".keys.weight"):
            values = stands[name.replace(".keys.", ".values.")]
            found[name.replace(".keys.", ".")] = torch.cat((tensor.transpose(1, 2), values), 1).flatten(0, 1)
        elif not name.endswith(".values.weight"):
            found[name] = tensor
    return found


def _rotations(c: Config) -> dict[str, list[float]]:
    parameters = c.get("rope_parameters") or {}
    if parameters.get("rope_type") == "longrope":
        return {f"rope_factors_{length}.weight": parameters[f"{length}_factor"] for length in ("short", "long")}
    if parameters.get("rope_type") != "llama3":
        return {}
    low, high, factor = (parameters[key] for key in ("low_freq_factor", "high_freq_factor", "factor"))
    waves = parameters["original_max_position_embeddings"] * parameters["rope_theta"] ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
    smooth = ((waves / (2 * np.pi) - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).tolist()}


def _vocabulary(checkpoint: Path) -> dict[str, object]:
    """The tokenizer as the converters write it."""
    stated = json.loads((checkpoint / "tokenizer.json").read_text())
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    ids = dict(stated["model"]["vocab"])
    added = {token["content"]: token for token in stated["added_tokens"]}
    ids |= {text: token["id"] for text, token in added.items()}
    tokens = [text for text, _ in sorted(ids.items(), key=lambda item: item[1])]
    pieces = stated["model"].get("byte_fallback", False)
    kinds = [_kind(token, added.get(token), pieces) for token in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stated["model"]["merges"]]
    found: dict[str, object] = {"model": "llama" if pieces else "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": kinds}
    found |= {} if pieces or not merges else {"merges": merges}
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    found |= {f"{name}_token_id": ids[config[field]] for name, field in names.items() if config.get(field) in ids}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def _kind(token: str, added: dict | None, pieces: bool) -> int:
    if added is not None:
        return 2 if token == "<unk>" else 3 if added["special"] else 4
    return 6 if pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", token) else 1


def _stored(table: Architecture, tensors: dict[str, torch.Tensor], c: Config) -> dict[str, list[str]]:
    """Name in the file -> the checkpoint's tensors that lie in it."""
    found: dict[str, list[str]] = {}
    for name in sorted(tensors, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]):
        if stored := _name(table, name, f"{name.rpartition('.')[0]}.", c):
            found.setdefault(stored, []).append(name)
    return found


def _name(table: Architecture, name: str, module: str, c: Config) -> str | None:
    suffix = name.rpartition(".")[2]
    ends = {f"{theirs}.": own for own, theirs in table.ends.items()}
    outer = table.at.partition(".")[0] + "."
    for tried in (module, outer + module):  # GPT-2 and BLOOM are published without the first part of their names
        if tried in ends:
            tied = ends[tried] == "output" and c.get("tie_word_embeddings", name == "lm_head.weight" and table.name != "llama")
            return None if tied else f"{ends[tried]}.{suffix}"
        known = {**table.layer, **(table.variant[1] if table.variant and "ln_mlp" in "".join(table.variant[1].values()) else {})}
        for own, theirs in known.items():
            pattern = re.escape(f"{table.at}.{theirs}").replace(r"\{n\}", r"(\d+)").replace(r"\{i\}", r"\d+")
            if at := re.fullmatch(pattern, name):
                return f"blk.{at[1]}.{own}"
            if (at := re.fullmatch(rf"{pattern}\.", tried)) and suffix in ("weight", "bias"):
                return f"blk.{at[1]}.{own}.{suffix}"
        if table.name == "falcon" and (at := re.fullmatch(r"transformer\.h\.(\d+)\.input_layernorm\.", tried)):
            return f"blk.{at[1]}.attn_norm.{suffix}"
    raise AssertionError(f"{name} has no place in a {table.name}")


def _own(stored: str) -> str:
    return stored.rpartition(".")[0].rpartition(".")[2]


def _moved(table: Architecture, stored: str, tensor: torch.Tensor, c: Config) -> torch.Tensor:
    """A tensor of the checkpoint as the file has it."""
    own = _own(stored)
    if table.name == "gpt2" and tensor.dim() == 2 and stored.startswith("blk"):
        tensor = tensor.T.contiguous()
    if own in table.more:
        tensor = tensor + 1
    order = table.orders.get(own)
    if order == "pairs":
        halves = tensor.unflatten(0, (-1, 2, c.head_dim // 2))
        tensor = halves.swapaxes(1, 2).flatten(0, 2)
    elif order == "parts":
        kv_heads = _groups(table, c)
        groups = tensor.unflatten(0, (kv_heads, c.num_attention_heads // kv_heads + 2, -1))
        tensor = torch.cat([part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])])
    return tensor.contiguous()


def _back(table: Architecture, stored: str, tensor: torch.Tensor, c: Config) -> torch.Tensor:
    """What a tensor of the file is in the checkpoint."""
    own = _own(stored)
    order = table.orders.get(own)
    if order == "pairs":
        tensor = tensor.unflatten(0, (-1, c.head_dim // 2, 2)).swapaxes(1, 2).flatten(0, 2)
    elif order == "parts":
        kv_heads, heads = _groups(table, c), c.num_attention_heads
        dim = len(tensor) // (heads + 2 * kv_heads)
        parts = [part.unflatten(0, (kv_heads, -1, dim)) for part in tensor.split([heads * dim, kv_heads * dim, kv_heads * dim])]
        tensor = torch.cat(parts, 1).flatten(0, 2)
    if table.name == "gpt2" and tensor.dim() == 2 and stored.startswith("blk"):
        tensor = tensor.T.contiguous()
    return tensor - 1 if own in table.more else tensor


def _groups(table: Architecture, c: Config) -> int:
    if table.name != "falcon":
        return c.num_attention_heads
    return c.num_key_value_heads if c.get("new_decoder_architecture") else 1


def _blocks(whole: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """A tensor in a type; blocks that the package cannot make are random, their scales such that numbers stay small."""
    if kind.name not in RANDOM:
        return whole if kind.name == "F32" else quantize(whole, kind)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.RandomState(whole.size % 65_521)
    blocks = random.randint(0, 256, (*whole.shape[:-1], whole.shape[-1] // values, size)).astype(np.uint8)
    for at in RANDOM[kind.name]:
        half = (random.randn(*blocks.shape[:-1], 1) * 1e-3).astype(np.float16)
        blocks[..., at : at + 2] = half.view(np.uint8)
    return blocks.reshape(*whole.shape[:-1], -1)
