"""From a folder to a model that runs: description, plan, audit, then the modules, one linear at a time."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from kvrun import models
from kvrun.attention.backend import Scores
from kvrun.attention.native import Native
from kvrun.dist import Group
from kvrun.errors import DeviceError, Unsupported
from kvrun.nn.attention import Attention
from kvrun.nn.decoder import Decoder
from kvrun.nn.embedding import Embedding, Head
from kvrun.nn.linear import Linear, Source
from kvrun.nn.loaded import LoadedModel
from kvrun.nn.mlp import GatedMlp, Mlp
from kvrun.nn.norms import LayerNorm, Norm, RmsNorm
from kvrun.nn.positions import RotaryTable, alibi_slopes
from kvrun.nn.residual import Branch, Residual
from kvrun.nn.step import Mixer
from kvrun.quant import Dense, DenseLinear, LinearFormat, choose
from kvrun.spec import Alibi, Config, Model, Rope
from kvrun.spec import mixers as spec_mixers
from kvrun.spec import norms as spec_norms
from kvrun.state.pages import PageShape
from kvrun.weights.checkpoint import Checkpoint
from kvrun.weights.load import Loader, indices, torch_dtype
from kvrun.weights.naming import probe
from kvrun.weights.plan import LinearPlan, ModelPlan, plan_mixer, plan_model, plan_norm, step_branches, whole
from kvrun.weights.split import Split
from kvrun.weights.vocabulary import vocabulary_limit

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    group: Group | None = None,
    quantize: str | None = None,
) -> LoadedModel:
    """Load this rank's share of the model in a folder.

    `dtype` "auto" is the config's own. Raises ConfigError, FilesError, Unsupported or DeviceError before any weight is read
    when something about the folder is wrong.
    """
    if torch.device(device).type != "cpu":
        raise DeviceError(f"device {device} was asked for, this version computes on cpu; use --device cpu")
    group = group or Group.single()
    config, model = models.read(folder)
    weights = choose(quantize, config.get("quantization_config") or config.get("compression_config"))
    checkpoint = Checkpoint.open(folder)
    loader = Loader(checkpoint, probe(model, checkpoint.entries))
    plan = plan_model(model, Split(group.rank, group.world))
    loader.audit(plan, weights.tensors(), model.leftovers)
    chosen = _dtype(dtype, config, checkpoint)
    build = _Build(model, plan, loader, weights, chosen, group)
    decoder = build.decoder()
    checkpoint.close()
    vocabulary = model.decoder.embed.vocabulary
    return LoadedModel(
        spec=model,
        config=config,
        architecture=config.architecture,
        decoder=decoder,
        linears=build.linears,
        page_shapes=build.page_shapes,
        vocabulary=vocabulary,
        vocabulary_limit=vocabulary_limit(folder, vocabulary),
        positions=model.positions,
        end_tokens=config.end_tokens,
        dtype=chosen,
        device=device,
        weight_bytes=build.elements * chosen.itemsize,
        parameters=sum(math.prod(entry.shape) for entry in checkpoint.entries.values()),
        digest=checkpoint.digest,
    )


def _dtype(asked: str | torch.dtype, config: Config, checkpoint: Checkpoint) -> torch.dtype:
    if isinstance(asked, torch.dtype):
        return asked
    name = asked
    if asked == "auto":
        stored = {entry.dtype for entry in checkpoint.entries.values()} & {"F32", "BF16", "F16"}
        name = str(config.get("dtype") or torch_dtype(min(stored, default="F32"))).removeprefix("torch.")
    if name not in DTYPES:
        raise Unsupported(f"--dtype {asked}: {name} is not served; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


class _Build:
    """The walk over a description that makes its modules."""

    def __init__(self, model: Model, plan: ModelPlan, loader: Loader, weights: LinearFormat, dtype: torch.dtype, group: Group) -> None:
        self.linears: list[Linear] = []
        self.page_shapes: list[PageShape] = []
        self._model, self._plan, self._loader, self._format = model, plan, loader, weights
        self._split, self._dtype, self._group, self._dense = plan.split, dtype, group, Dense()
        # One tensor at both ends: the embedding looks its rows up in the head's packed copy.
        self._shares_embedding = loader.stored(plan.embed) == loader.stored(plan.head.weight)
        self._hidden = model.decoder.embed.hidden
        self._rotaries: dict[Rope, RotaryTable] = {}  # layers that rotate alike share a table

    @property
    def elements(self) -> int:
        """Numbers this rank holds: a checkpoint may store both ends of a model that calls them tied."""
        tied = self._model.decoder.head.tied
        return self._plan.elements + self._plan.embed.elements * (tied and not self._shares_embedding)

    def decoder(self) -> Decoder:
        """All of it, in the order in which a token passes through."""
        head = self._head_weight()
        embed = self._embedding(head)
        residuals = []
        for layer in self._model.decoder.layers:
            for step in layer.steps:
                branches = [
                    Branch(self._norm(norm, layer.at), tuple(self._mixer(mixer, layer.at) for mixer in mixers))
                    for norm, mixers in step_branches(step)
                ]
                residuals.append(Residual(tuple(branches), self._group))
        return Decoder(embed, tuple(residuals), self._head(head), Native(), tuple(self._rotaries.values()))

    def _head_weight(self) -> DenseLinear:
        return self._dense.build({"weight": self._loader.table(self._plan.head.weight, self._dtype)}, self._dtype)

    def _embedding(self, head: DenseLinear) -> Embedding:
        embed, plan = self._model.decoder.embed, self._plan.embed
        rows = head.rows if self._shares_embedding else partial(functional.embedding, weight=self._loader.table(plan, self._dtype))
        learned, held = embed.position, plan.rows[0]
        if learned is None:
            return Embedding(rows, held, self._group)
        positions = self._loader.table(whole(f"{learned.name}.weight", (learned.rows, embed.hidden)), self._dtype)
        return Embedding(rows, held, self._group, positions, learned.offset)

    def _head(self, weight: DenseLinear) -> Head:
        plan, norm = self._plan.head, self._norm(self._model.decoder.head.norm, "")
        bias = None if plan.bias is None else self._loader.table(plan.bias, self._dtype)
        return Head(norm, weight, bias, self._split.sizes(self._model.decoder.embed.vocabulary), self._group)

    def _norm(self, norm: spec_norms.Norm, at: str) -> Norm:
        vectors = {key: self._loader.table(plan, self._dtype) for key, plan in plan_norm(norm, at, self._hidden).items()}
        if isinstance(norm, spec_norms.RmsNorm):
            return RmsNorm(vectors["weight"], norm.eps, norm.offset)
        return LayerNorm(vectors.get("weight"), vectors.get("bias"), norm.eps)

    def _mixer(self, mixer: spec_mixers.Mixer, at: str) -> Mixer:
        plans = plan_mixer(mixer, at, self._hidden, self._split)
        linears = {key: self._linear(plan) for key, plan in plans.items()}
        if isinstance(mixer, spec_mixers.Attention):
            return self._attention(mixer, linears)
        if isinstance(mixer, spec_mixers.GatedMlp):
            return GatedMlp(linears["gate_up"], linears["down"], _activation(mixer.act))
        return Mlp(linears["up"], linears["down"], _activation(mixer.act))

    def _attention(self, mixer: spec_mixers.Attention, linears: dict[str, Linear]) -> Attention:
        share, position = self._split.heads(mixer.heads, mixer.kv_heads), mixer.position
        scale = mixer.head_dim**-0.5 if mixer.scale is None else mixer.scale
        slopes = None
        if isinstance(position, Alibi):
            slopes = (alibi_slopes(mixer.heads) * position.scale)[share.query[0] : share.query[1]].contiguous()
        rotary = self._rotary(position) if isinstance(position, Rope) else None
        self.page_shapes.append(PageShape(share.kv_heads, mixer.head_dim))
        return Attention(
            layer=len(self.page_shapes) - 1,
            heads=share.heads,
            kv_heads=share.kv_heads,
            head_dim=mixer.head_dim,
            qkv=linears["qkv"],
            out=linears["out"],
            rotary=rotary,
            scores=Scores(scale, mixer.window or 0, slopes),
        )

    def _rotary(self, rope: Rope) -> RotaryTable:
        if rope not in self._rotaries:
            self._rotaries[rope] = RotaryTable(rope)
        return self._rotaries[rope]

    def _linear(self, plan: LinearPlan) -> Linear:
        weight = self._format.build(self._loader.linear(plan, self._format.tensors()), self._dtype)
        bias = self._loader.bias(plan, self._dtype)
        linear = Linear(len(self.linears), plan.role, _sources(plan), weight, bias, plan.out_features, plan.in_features)
        self.linears.append(linear)
        return linear


def _sources(plan: LinearPlan) -> tuple[Source, ...]:
    sources, column = [], 0
    for cut in plan.cuts:
        rows = indices(cut.rows)
        cols = None if cut.cols == ((0, cut.in_features),) else indices(cut.cols)
        sources.append(Source(cut.module, rows, column, cols, cut.out_features, cut.in_features))
        column += len(rows)
    return tuple(sources)


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise Unsupported(f"activation {name} is not served; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
