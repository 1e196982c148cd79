"""Attention over latents. Keys and values are never made: each head's share of that product is moved to its query and its output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvrun.attention.backend import Kind, Scores
from kvrun.nn.grouped import GroupedLinear, Groups
from kvrun.nn.linear import Linear, Source
from kvrun.nn.norms import Norm, norm_of
from kvrun.nn.parts import Folded, Parts, build_mixer
from kvrun.nn.positions import RotaryTable
from kvrun.nn.step import ForwardStep
from kvrun.quant import DenseLinear
from kvrun.spec import LowRank
from kvrun.spec import latent as spec
from kvrun.weights.load import indices


@dataclass(frozen=True)
class LatentAttention:
    """out(values(attend(keys(query(x))))) over the latents and rotated keys of all tokens, a partial sum over the ranks' heads.

    A head's score for a token is (Wk c) q = c (Wk^T q), its output the sum of Wv c = Wv times the sum of c; c is the latent.
    """

    layer: int  # of the page pool
    heads: int  # of this rank
    plain_dim: int
    latent_dim: int
    query_down: Linear | None
    query_norm: Norm | None
    query: Linear
    down: Linear
    norm: Norm
    keys: GroupedLinear  # Wk^T of every head
    values: GroupedLinear  # Wv of every head
    out: Linear
    rotary: RotaryTable
    scores: Scores

    def __call__(self, x: Tensor, step: ForwardStep) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        tokens, lora = len(x), step.lora
        made = self.down(x, lora)
        if self.query_down is not None and self.query_norm is not None:
            x = self.query_norm(self.query_down(x, lora))
        q = self.query(x, lora).view(tokens, self.heads, -1)
        plain, rotated, key = q[..., : self.plain_dim], q[..., self.plain_dim :], made[:, None, self.latent_dim :]
        self.rotary.rotate(rotated, key, step.positions, step.long)
        groups = Groups(torch.arange(self.heads + 1, device=x.device) * tokens, torch.arange(tokens, device=x.device).repeat(self.heads))
        asked = self.keys(plain.transpose(0, 1).reshape(self.heads * tokens, -1), groups, lora).view(self.heads, tokens, -1)
        query = torch.cat([asked.transpose(0, 1), rotated], -1)
        remembered = torch.cat([self.norm(made[:, : self.latent_dim]).unsqueeze(1), key], -1)
        mixed = step.attention.run(self.layer, query, remembered, None, self.scores)
        values = self.values(mixed.transpose(0, 1).reshape(self.heads * tokens, -1), groups, lora).view(self.heads, tokens, -1)
        return self.out(values.transpose(0, 1).reshape(tokens, -1), lora)


@build_mixer.register
def _(mixer: spec.LatentAttention, parts: Parts) -> LatentAttention:
    shared, low_rank = parts.shared, isinstance(mixer.query, LowRank)
    heads = shared.split.heads(mixer.heads, mixer.heads).heads
    keys, values = _taken_apart(mixer, parts.folded["up"], heads, parts)
    assert parts.pages is not None, "attention keeps pages"
    scores = Scores(scale=mixer.scale, value_dim=mixer.latent_dim)
    shared.kinds.append(Kind(heads, parts.pages.kv_heads, parts.pages.head_dim, scores))
    return LatentAttention(
        layer=shared.page_layer(parts.pages),
        heads=heads,
        plain_dim=mixer.plain_dim,
        latent_dim=mixer.latent_dim,
        query_down=parts.linears["query_down"] if low_rank else None,
        query_norm=norm_of(mixer.query.norm, {"weight": parts.tables["query_norm.weight"]}) if isinstance(mixer.query, LowRank) else None,
        query=parts.linears["query"],
        down=parts.linears["down"],
        norm=norm_of(mixer.norm, {"weight": parts.tables["norm.weight"]}),
        keys=keys,
        values=values,
        out=parts.linears["out"],
        rotary=shared.rotary(mixer.position),
        scores=scores,
    )


def _taken_apart(mixer: spec.LatentAttention, up: Folded, heads: int, parts: Parts) -> tuple[GroupedLinear, GroupedLinear]:
    """Every head's key matrix, turned round, and its value matrix, as linears of their own that adapters find."""
    keys, values, all_latents, source = [], [], indices(((0, mixer.latent_dim),)), up.source
    sizes = [mixer.plain_dim, mixer.value_dim] * heads
    weights, rows = up.weight.split(sizes), source.rows.split(sizes)
    for key, value, key_rows, value_rows in zip(weights[::2], weights[1::2], rows[::2], rows[1::2], strict=True):
        turned = Source(source.module, all_latents, 0, key_rows, mixer.latent_dim, source.out_features, flipped=True, also=source.also)
        plain = Source(source.module, value_rows, 0, None, source.out_features, mixer.latent_dim, also=source.also)
        keys.append(parts.shared.linear("column", (turned,), DenseLinear(key.T), None, mixer.latent_dim, mixer.plain_dim))
        values.append(parts.shared.linear("column", (plain,), DenseLinear(value), None, mixer.value_dim, mixer.latent_dim))
    return GroupedLinear(keys), GroupedLinear(values)
