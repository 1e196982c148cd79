"""Baichuan, which transformers has no class of: its Llama with other files and, for the 13B sizes, another attention mask."""

from collections.abc import Callable

import torch

from tiny.row import LLAMA, Row, Tensors

MULTI_HEAD = {**LLAMA, "num_key_value_heads": 4}
FIVE_HEADS = {**LLAMA, "num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 80}


def packed(architecture: str, **fields: object) -> Callable[[dict, Tensors], tuple[dict, Tensors]]:
    """Query, key and value in one matrix, under the published class name."""

    def publish(config: dict, tensors: Tensors) -> tuple[dict, Tensors]:
        found = dict(tensors)
        for name in tensors:
            if name.endswith("q_proj.weight"):
                parts = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
                found[name.replace("q_proj", "W_pack")] = torch.cat(parts)
        return {**config, "architectures": [architecture], "model_type": "baichuan", **fields}, found

    return publish


def sloped(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits without rotation, every score moved by its head's slope times the distance."""
    model.model.rotary_emb.inv_freq.zero_()
    heads, tokens = model.config.num_attention_heads, ids.shape[1]
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)] + [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    at = torch.arange(tokens)
    distance = (at[None] - at[:, None]).float()
    mask = torch.where(distance > 0, float("-inf"), distance * torch.tensor(slopes)[:, None, None])
    return model(ids, attention_mask=mask[None]).logits


def unit_head(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The same with the head's rows scaled to length 1."""
    model.lm_head.weight.data = torch.nn.functional.normalize(model.lm_head.weight.data)
    return sloped(model, ids)


ROWS = {
    "baichuan_7b": Row("llama", MULTI_HEAD, published=packed("BaiChuanForCausalLM"), architecture="BaiChuanForCausalLM", seed=1),
    "baichuan_13b": Row(
        "llama", FIVE_HEADS, published=packed("BaichuanForCausalLM"), logits=sloped, architecture="BaichuanForCausalLM", seed=15
    ),
    "baichuan2_13b": Row(
        "llama",
        FIVE_HEADS,
        published=packed("BaichuanForCausalLM", z_loss_weight=0),
        logits=unit_head,
        architecture="BaichuanForCausalLM",
        seed=15,
    ),
}
