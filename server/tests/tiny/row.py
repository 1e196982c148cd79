"""What a row of the table of tiny checkpoints says."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

VOCABULARY = 259  # the specials and 256 bytes
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
LLAMA = {**COMMON, **SHAPE, "num_key_value_heads": 2, "intermediate_size": 96, "tie_word_embeddings": False}

# What an encoder reads where a test says nothing else.
SOURCE = [17, 203, 5, 96, 140, 31, 8, 250, 77, 12, 64, 199, 3, 45, 120, 88, 231, 19, 57]

# How far logits in float32 may lie from transformers', in standard deviations of the latter: rounding, and nothing else.
CLOSE = 1e-4
# How much likelier transformers may find another token than a greedy answer's: what both may be off by.
TIE = 2 * CLOSE

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One tiny model: what transformers makes it of, and what is special about its files or its oracle."""

    kind: str  # transformers' model type
    config: dict
    # Of its weights. Scores as large as these weights make them come so close to each other in some draws that the last bit of a
    # float32 decides between two keys or two experts. `draws.py` finds draws in which transformers' own answers hang on none;
    # what this server answers has no part in that.
    seed: int = 0
    # From transformers' config and tensors to those of the published checkpoints, where the two differ.
    published: Callable[[dict, Tensors], tuple[dict, Tensors]] | None = None
    attention: str = "eager"  # the implementation that computes the truth
    logits: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor] = lambda model, ids: model(ids).logits
    architecture: str | None = None  # of the published checkpoint; None = as transformers names it
    auto: str = "AutoModelForCausalLM"  # transformers' class that makes it
    specials: tuple[str, ...] = ()  # special tokens after all others
    adjust: Callable[[torch.nn.Module], None] = lambda model: None  # after its weights were drawn
    # Then, for all but `test_formulas`, makes smaller what no draw keeps a float32's last bit from deciding.
    settle: Callable[[torch.nn.Module], None] = lambda model: None
    prepare: Callable[[Path], None] = lambda folder: None  # writes further files


def rope(kind: str, theta: float = 1e4, **numbers: float) -> dict:
    """Rope parameters as transformers takes them."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **numbers}}
