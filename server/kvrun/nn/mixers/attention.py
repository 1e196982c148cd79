"""Self-attention of this rank's heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvrun.attention.backend import Kind, Scores
from kvrun.nn.heads import HeadsNorm, heads_norm
from kvrun.nn.linear import Linear
from kvrun.nn.parts import Parts, build_mixer
from kvrun.nn.positions import RotaryTable, alibi_slopes, relative_bias
from kvrun.nn.step import ForwardStep
from kvrun.spec import Alibi, RelativeBias, Rope, SourceAttention
from kvrun.spec import mixers as spec
from kvrun.state.shapes import PageUse


@dataclass(frozen=True)
class Attention:
    """out(attend(rotate(clip(norm(qkv(x)))))), a partial sum over the ranks' heads."""

    layer: int  # of the page pool
    heads: int  # of this rank
    kv_heads: int  # of this rank
    head_dim: int
    qkv: Linear
    out: Linear
    scores: Scores
    rotary: RotaryTable | None = None
    clip: float | None = None
    norm: HeadsNorm | None = None

    def __call__(self, x: Tensor, step: ForwardStep) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        both, heads = self.heads + self.kv_heads, self.heads
        qkv = self.qkv(x, step.lora).view(-1, both + self.kv_heads, self.head_dim)
        q, k, v = qkv[:, :heads], qkv[:, heads:both], qkv[:, both:]
        if self.norm is not None:
            q, k = self.norm(q, k)
        if self.clip is not None:
            for part in (q, k, v):
                part.clamp_(-self.clip, self.clip)
        if self.rotary is not None:
            self.rotary.rotate(q, k, step.positions, step.long)
        mixed = step.attention.run(self.layer, q, k, v, self.scores)
        return self.out(mixed.view(-1, heads * self.head_dim), step.lora)


@build_mixer.register
def _(mixer: spec.Attention, parts: Parts) -> Attention:
    shared, position, sinks = parts.shared, mixer.position, parts.tables.get("sinks")
    share = shared.split.heads(mixer.heads, mixer.kv_heads)
    slopes = None
    if isinstance(position, Alibi):
        slopes = (alibi_slopes(mixer.heads) * position.scale)[share.query[0] : share.query[1]].contiguous()
    relative = None
    if isinstance(position, RelativeBias):
        relative = relative_bias(position, parts.tables["relative"])[share.query[0] : share.query[1]].contiguous()
    assert parts.pages is not None, "attention keeps pages"
    use = PageUse.READING if isinstance(mixer, SourceAttention) else PageUse.SEQUENCE
    scores = Scores(
        scale=mixer.head_dim**-0.5 if mixer.scale is None else mixer.scale,
        window=mixer.window or 0,
        slopes=slopes,
        softcap=mixer.softcap or 0.0,
        sinks=None if sinks is None else sinks.float(),
        relative=relative,
    )
    shared.kinds.append(Kind(share.heads, share.kv_heads, mixer.head_dim, scores, use))
    return Attention(
        layer=shared.page_layer(parts.pages, use),
        heads=share.heads,
        kv_heads=share.kv_heads,
        head_dim=mixer.head_dim,
        qkv=parts.linears["qkv"],
        out=parts.linears["out"],
        scores=scores,
        rotary=shared.rotary(position) if isinstance(position, Rope) else None,
        clip=mixer.clip,
        norm=None if mixer.norm is None else heads_norm(mixer, mixer.norm, share, parts),
    )
