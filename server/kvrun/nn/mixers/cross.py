"""Attention to what an encoder made of a sequence's source."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvrun.attention.backend import Kind, Scores
from kvrun.nn.heads import PerHead, per_head
from kvrun.nn.linear import Linear
from kvrun.nn.parts import Parts, build_mixer
from kvrun.nn.step import ForwardStep
from kvrun.spec import CrossAttention as SpecCrossAttention
from kvrun.spec import LookAt as SpecLookAt
from kvrun.state.shapes import PageUse


@dataclass(frozen=True)
class CrossAttention:
    """out(attend(query(x))), a partial sum over the ranks' heads; keys and values were kept when the source was read."""

    layer: int  # of the page pool
    head_dim: int
    query: Linear
    key_value: Linear
    out: Linear
    scores: Scores

    def __call__(self, x: Tensor, step: ForwardStep) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        q = self.query(x, step.lora).view(len(x), -1, self.head_dim)
        mixed = step.attention.recall(self.layer, q, self.scores)
        return self.out(mixed.view(len(x), -1), step.lora)

    def remember(self, memory: Tensor, step: ForwardStep) -> None:
        """See Reader."""
        k, v = self.key_value(memory, step.lora).view(len(memory), 2, -1, self.head_dim).unbind(1)
        step.attention.store(self.layer, k, v)


@dataclass(frozen=True)
class LookAt(CrossAttention):
    """The same of what an image's features are, with queries and keys normalised."""

    norm: PerHead | None = None

    def __call__(self, x: Tensor, step: ForwardStep) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        q = self.query(x, step.lora).view(len(x), -1, self.head_dim)
        q = q if self.norm is None else self.norm.queries(q)
        return self.out(step.attention.recall(self.layer, q, self.scores).view(len(x), -1), step.lora)

    def remember(self, memory: Tensor, step: ForwardStep) -> None:
        """See Reader."""
        k, v = self.key_value(memory, step.lora).view(len(memory), 2, -1, self.head_dim).unbind(1)
        k = k if self.norm is None else self.norm.keys(k)
        step.attention.store(self.layer, k, v)


@build_mixer.register
def _(mixer: SpecLookAt, parts: Parts) -> LookAt:
    assert parts.pages is not None, "what is looked at lies in pages"
    layer, scores = parts.shared.page_layer(parts.pages, PageUse.MEMORY), Scores(mixer.head_dim**-0.5)
    norm = None if mixer.norm is None else per_head(mixer.norm, parts.tables)
    module = LookAt(layer, mixer.head_dim, **parts.linears, scores=scores, norm=norm)
    _keep(module, parts)
    return module


@build_mixer.register
def _(mixer: SpecCrossAttention, parts: Parts) -> CrossAttention:
    assert parts.pages is not None, "what is read lies in pages"
    scale = mixer.head_dim**-0.5 if mixer.scale is None else mixer.scale
    layer = parts.shared.page_layer(parts.pages, PageUse.MEMORY)
    linears = parts.linears
    module = CrossAttention(layer, mixer.head_dim, linears["query"], linears["key_value"], linears["out"], Scores(scale))
    _keep(module, parts)
    return module


def _keep(module: CrossAttention, parts: Parts) -> None:
    assert parts.pages is not None, "what is read lies in pages"
    heads = parts.linears["query"].out_features // module.head_dim
    parts.shared.kinds.append(Kind(heads, parts.pages.kv_heads, module.head_dim, module.scores, PageUse.MEMORY))
    parts.shared.readers.append(module)
