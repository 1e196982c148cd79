"""From a folder to a model that runs: description, plan, audit, then the modules, one linear at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import kvrun.nn.mixers  # noqa: F401  (registers the module of every kind of mixer)
from kvrun import models
from kvrun.attention.choice import Maker, choose_attention
from kvrun.attention.native import Native
from kvrun.device import Cpu, Device
from kvrun.dist import Group
from kvrun.errors import Unsupported
from kvrun.nn.decoder import Decoder
from kvrun.nn.embedding import Embedding, Head
from kvrun.nn.encoder import Encoder
from kvrun.nn.linear import Linear, Source
from kvrun.nn.loaded import LoadedModel
from kvrun.nn.norms import Narrowed, Norm, norm_of
from kvrun.nn.parts import Folded, Parts, Shared, build_mixer
from kvrun.nn.residual import Branch, PostNorm, Residual
from kvrun.nn.step import Mixer
from kvrun.nn.vision.build import build_sight
from kvrun.nn.vision.sight import Sight
from kvrun.quant import CodedLinear, Dense, DenseLinear, LinearFormat, QuantizedLinear, choose
from kvrun.quant import build as build_weight
from kvrun.quant.made import Made
from kvrun.quant.packed_cache import PackedCache
from kvrun.spec import Config, Model, Parallel, Step, UnitHead
from kvrun.spec import PostNorm as SpecPostNorm
from kvrun.spec import mixers as spec_mixers
from kvrun.spec import norms as spec_norms
from kvrun.weights.checkpoint import Checkpoint
from kvrun.weights.held import method
from kvrun.weights.load import Loader, indices, torch_dtype
from kvrun.weights.naming import Naming, probe
from kvrun.weights.plan import LinearPlan, ModelPlan, Role, TablePlan, plan_mixer, plan_model, plan_norm
from kvrun.weights.reading import memory_given_back
from kvrun.weights.split import Split
from kvrun.weights.vocabulary import vocabulary_limit

# What --activation-dtype takes: the numbers that inputs become, the codes that they meet, and what makes such codes.
ROUNDED = {
    "int8": (torch.int8, "integer codes", "int8 or int4"),
    "fp8": (torch.float8_e4m3fn, "codes of float8_e4m3fn that share a scale for each output", "fp8"),
}
PEFT_HEAD = "lm_head"  # what transformers calls any model's head, whatever its published files call it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: Device | None = None,
    group: Group | None = None,
    quantize: str | None = None,
    activation_dtype: str = "auto",
    packed_cache: Path | None = None,
    attention: str = "auto",
) -> LoadedModel:
    """Load this rank's share of the model in a folder.

    `device` None is the CPU · `dtype` "auto" is the config's own, or what suits the device better · `activation_dtype` "auto"
    is that of the model, "int8" and "fp8" round what quantized linears take · `packed_cache` is a folder that keeps weights as the
    kernels read them, for the next start · `attention` is what computes it, by the names of --attention.
    Raises ConfigError, FilesError or Unsupported before any weight is read when something about the folder is wrong.
    """
    device, group = device or Cpu(), group or Group.single()
    attend = choose_attention(attention, device.place, device.capability)
    config, model = models.read(folder)
    stored = config.get("quantization_config") or config.get("compression_config")
    weights = choose(quantize, stored)
    checkpoint = Checkpoint.open(folder)
    loader = Loader(checkpoint, probe(model, checkpoint.entries))
    plan = plan_model(model, Split(group.rank, group.world, weights.unit))
    loader.audit(plan, weights, model.leftovers)
    chosen = _dtype(dtype, config, checkpoint)
    chosen = device.suited(chosen, model.magnitude) if dtype == "auto" else chosen
    _refuse_narrow(chosen, model)
    rounded = _rounded(activation_dtype, device, chosen, weights)
    cache = PackedCache(packed_cache, checkpoint.stamp, chosen, method(quantize, stored), rounded, group.rank, group.world)
    build = _Build(model, plan, loader, weights, chosen, group, rounded, cache, attend)
    vocabulary = model.decoder.embed.vocabulary
    with memory_given_back(), ThreadPoolExecutor(1) as beside, device.place:
        # A large tokenizer takes longer to read than packed weights to find.
        limit = beside.submit(vocabulary_limit, folder, vocabulary)
        decoder = build.decoder()
        encoder = build.encoder(decoder.embed)
        sight = build.sight()
    loader.close()
    if rounded and not any(linear.weight.rounded for linear in build.linears):
        raise Unsupported(f"{_meets(activation_dtype)}, and the codes of {method(quantize, stored)} are none; leave it out")
    cache.keep()
    return LoadedModel(
        spec=model,
        config=config,
        architecture=config.architecture,
        decoder=decoder,
        encoder=encoder,
        sight=sight,
        readers=tuple(build.shared.readers),
        linears=build.linears,
        page_shapes=build.shared.pages.shapes,
        slot_shapes=build.shared.slots,
        vocabulary=vocabulary,
        vocabulary_limit=limit.result(),
        positions=model.positions,
        end_tokens=config.end_tokens,
        dtype=chosen,
        device=device,
        quantize=method(quantize, stored),
        weight_bytes=build.elements * chosen.itemsize - sum(build.saved),
        parameters=plan_model(model, Split()).elements,
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


def _rounded(asked: str, device: Device, dtype: torch.dtype, weights: LinearFormat) -> torch.dtype | None:
    """What inputs of quantized linears become. Raises Unsupported where device, weights or the model's dtype have no such product."""
    if asked == "auto":
        return None
    if asked not in device.narrow:
        here = " or ".join(("auto", *device.narrow))
        raise Unsupported(f"--activation-dtype {asked} was asked for on {device.place}, which has no such product; {here} is served")
    narrow, _, made_by = ROUNDED[asked]
    if isinstance(weights, Dense):
        raise Unsupported(f"{_meets(asked)}, and nothing is quantized; leave it out, or add --quantize {made_by}")
    if narrow.is_floating_point and dtype != torch.bfloat16:
        raise Unsupported(f"--activation-dtype {asked} rounds what is bfloat16, and the model computes in {dtype}; add --dtype bfloat16")
    return narrow


def _meets(asked: str) -> str:
    return f"--activation-dtype {asked} rounds what is multiplied with {ROUNDED[asked][1]}"


def _refuse_narrow(dtype: torch.dtype, model: Model) -> None:
    most = torch.finfo(dtype).max
    if most < model.magnitude:
        name = str(dtype).removeprefix("torch.")
        raise Unsupported(f"the model's hidden states reach {model.magnitude:g}, {name} ends at {most:g}; use --dtype bfloat16 or float32")


class _Build:
    """The walk over a description that makes its modules."""

    def __init__(
        self,
        model: Model,
        plan: ModelPlan,
        loader: Loader,
        weights: LinearFormat,
        dtype: torch.dtype,
        group: Group,
        rounded: torch.dtype | None,
        cache: PackedCache,
        attend: Maker,
    ) -> None:
        self.shared = Shared(plan.split, group, dtype)
        self.linears = self.shared.linears
        self._model, self._plan, self._loader, self._format = model, plan, loader, weights
        self._shares_embedding = self._one_end()
        self.hidden = model.decoder.embed.hidden
        self._rounded, self._cache, self._attend = rounded, cache, attend
        self.saved: list[int] = []  # bytes that each coded weight takes less than as plain numbers
        self._whole = False  # whether what it makes is whole on every rank

    @property
    def elements(self) -> int:
        """Numbers this rank holds: a checkpoint may store both ends of a model that calls them tied."""
        tied = self._model.decoder.head.tied
        return self._plan.elements + self._plan.embed.table.elements * (tied and not self._shares_embedding)

    def decoder(self) -> Decoder:
        """All of it, in the order in which a token passes through."""
        head = self._head_weight()
        embed = self._embedding(head)
        residuals = tuple(self.step(step, layer.at) for layer in self._model.decoder.layers for step in layer.steps)
        rotaries, wide = tuple(self.shared.rotaries.values()), self._model.decoder.wide
        attention = self._attend(self.shared.kinds, self.shared.dtype)
        return Decoder(embed, residuals, self._head(head), attention, rotaries, wide)

    def encoder(self, embed: Embedding) -> Encoder | None:
        """The reader of sources, after the decoder, whose attention says where it keeps what."""
        encoder = self._model.encoder
        if encoder is None:
            return None
        residuals = tuple(self.step(step, layer.at) for layer in encoder.layers for step in layer.steps)
        return Encoder(embed, residuals, self.norm(encoder.norm, ""), tuple(self.shared.readers), Native())

    def sight(self) -> Sight | None:
        """What turns images into rows for the embedding."""
        return None if self._model.images is None else build_sight(self._model.images, self)

    def aside(self, hidden: int) -> _Build:
        """The same walk over layers of another width that every rank holds in full and no adapter changes."""
        other = copy(self)
        other.hidden, other.shared, other._whole = hidden, Shared(Split(), Group.single(), self.shared.dtype), True
        return other

    def _one_end(self) -> bool:
        """Whether one tensor in one form is both ends, so that the embedding looks its rows up in the head's packed copy."""
        embed, head = self._loader.end(self._plan.embed.table), self._loader.end(self._plan.head.weight)
        if embed.module != head.module or isinstance(self._model.decoder.head, UnitHead):
            return False
        held = self._loader.held(head)
        return type(self._format.of(head.module, "embedding", held)) is type(self._format.of(head.module, "head", held))

    def _head_weight(self) -> CodedLinear | DenseLinear:
        plan = self._plan.head.weight
        weight = self._end(plan, "head")
        if isinstance(self._model.decoder.head, UnitHead):
            cut, rows = self._loader.end(plan), {"weight": functional.normalize(weight.dense().float())}
            unit = self._format.of(cut.module, "head", rows).decode(rows, cut)
            weight = _alone(build_weight([unit], plan.shape[1], self.shared.dtype))
        return weight

    def _end(self, plan: TablePlan, role: Role) -> CodedLinear | DenseLinear:
        """The matrix of an end. One whose last rows are a tensor of their own is plain in every format."""
        if plan.rest is None:
            return _alone(self._weight(LinearPlan(role, (self._loader.end(plan),)), exact=True))
        return _alone(self._cache.weight(lambda: DenseLinear(self._loader.table(plan, self.shared.dtype))))

    def _embedding(self, head: CodedLinear | DenseLinear) -> Embedding:
        embed, plan = self._model.decoder.embed, self._plan.embed
        coded = self._loader.coded(plan.table, self._format, "embedding")
        if self._shares_embedding or coded:
            rows = partial(_rows, head if self._shares_embedding else self._end(plan.table, "embedding"), self.shared.dtype)
        else:
            rows = partial(functional.embedding, weight=self._loader.table(plan.table, self.shared.dtype))
        return Embedding(
            embed.name,
            embed.vocabulary,
            embed.width or embed.hidden,
            rows,
            held=plan.table.rows[0],
            group=self.shared.group,
            scale=embed.scale,
            project=None if plan.project is None else self.linear(plan.project),
            positions=None if plan.position is None else self._loader.table(plan.position, self.shared.dtype),
            offset=0 if embed.position is None else embed.position.offset,
            norm=None if embed.norm is None else norm_of(embed.norm, self.tables(plan.norm)),
        )

    def _head(self, weight: CodedLinear | DenseLinear) -> Head:
        head, plan = self._model.decoder.head, self._plan.head
        bias = None if plan.bias is None else self._loader.table(plan.bias, self.shared.dtype)
        vocabulary, width = plan.weight.shape
        source = Source(head.name, indices(plan.weight.rows), 0, None, vocabulary, width, also=PEFT_HEAD)
        linear = Linear(len(self.linears), "column", (source,), weight, bias, len(source.rows), width)
        self.linears.append(linear)
        return Head(
            linear,
            sizes=self.shared.split.sizes(self._model.decoder.embed.vocabulary),
            group=self.shared.group,
            norm=None if head.norm is None else self._narrowed(norm_of(head.norm, self.tables(plan.norm))),
            project=None if plan.project is None else self.linear(plan.project),
            scale=head.scale,
            softcap=head.softcap,
        )

    def step(self, step: Step, at: str) -> Residual | PostNorm:
        """A step of the layer at `at`."""
        group = self.shared.group
        if isinstance(step, SpecPostNorm):
            return PostNorm(Residual((Branch(None, self._mixers(step.mixers, at)),), group), self.norm(step.norm, at))
        residuals = step.residuals if isinstance(step, Parallel) else (step,)
        if len(residuals) > 1 and any(residual.after is not None or residual.scale != residuals[0].scale for residual in residuals):
            raise Unsupported(f"{at}: parallel residuals that are normalised or scaled apart are not served")
        branches = tuple(
            Branch(None if residual.norm is None else self.norm(residual.norm, at), self._mixers(residual.mixers, at))
            for residual in residuals
        )
        after = residuals[0].after
        return Residual(branches, group, None if after is None else self.norm(after, at), residuals[0].scale)

    def norm(self, norm: spec_norms.Norm | spec_norms.Gate, at: str) -> Norm:
        """A norm of the width of these layers."""
        return self._narrowed(norm_of(norm, self.tables(plan_norm(norm, at, self.hidden))))

    def _narrowed(self, norm: Norm) -> Norm:
        return Narrowed(norm, self.shared.dtype) if self._model.decoder.wide else norm

    def _mixers(self, mixers: Iterable[spec_mixers.Mixer], at: str) -> tuple[Mixer, ...]:
        return tuple(self._mixer(mixer, at) for mixer in mixers)

    def _mixer(self, mixer: spec_mixers.Mixer, at: str) -> Mixer:
        plan = plan_mixer(mixer, at, self.hidden, self.shared.split)
        linears = {key: self.linear(part) for key, part in plan.linears.items()}
        folded = {key: Folded(self._weight(part).dense(), _sources(part, self._loader.naming)[0]) for key, part in plan.folded.items()}
        return build_mixer(mixer, Parts(linears, self.tables(plan.tables), plan.pages, plan.slots, self.shared, folded))

    def tables(self, plans: Mapping[str, TablePlan]) -> dict[str, Tensor]:
        """This rank's rows of what was planned."""
        return {key: self._loader.table(plan, torch.float32 if plan.exact else self.shared.dtype) for key, plan in plans.items()}

    def linear(self, plan: LinearPlan) -> Linear:
        """A linear that adapters may change, unless this walk is an aside."""
        plan = replace(plan, role="whole") if self._whole else plan
        bias = self._loader.bias(plan, self.shared.dtype)
        return self.shared.linear(
            plan.role, _sources(plan, self._loader.naming), self._weight(plan), bias, plan.out_features, plan.in_features
        )

    def _weight(self, plan: LinearPlan, *, exact: bool = False) -> QuantizedLinear:
        weight = self._cache.weight(lambda: self._packed(plan, exact))
        if not isinstance(weight, DenseLinear):
            self.saved.append(plan.out_features * plan.in_features * self.shared.dtype.itemsize - weight.nbytes)
        return weight

    def _packed(self, plan: LinearPlan, exact: bool) -> QuantizedLinear:
        formats = [self._format.of(cut.module, plan.role, self._loader.held(cut)) for cut in plan.cuts]
        if all(isinstance(weights, Dense) for weights in formats) and not plan.transposed:
            rows = (rows for _, rows in self._loader.rows(plan.cuts))
            return DenseLinear.of(rows, plan.out_features, plan.in_features, self.shared.dtype)
        rounded = None if exact else self._rounded
        made = [weights for weights in formats if isinstance(weights, Made)]
        if len(made) == len(formats) and not plan.transposed:
            # Rows come on the host; codes are made where the model will lie.
            codes = (made[0].decode({"weight": torch.as_tensor(rows)}, cut) for cut, rows in self._loader.rows(plan.cuts))
            return CodedLinear.of(codes, plan.out_features, plan.in_features, rounded)
        parts = [
            weights.decode(self._loader.linear(plan, weights.tensors(), cut), cut) for cut, weights in zip(plan.cuts, formats, strict=True)
        ]
        return build_weight(parts, plan.in_features, self.shared.dtype, rounded)


def _alone(weight: QuantizedLinear) -> CodedLinear | DenseLinear:
    assert isinstance(weight, CodedLinear | DenseLinear), "one part has nothing to be stacked with"
    return weight


def _rows(weight: CodedLinear | DenseLinear, dtype: torch.dtype, ids: Tensor) -> Tensor:
    return weight.rows(ids).to(dtype)


def _sources(plan: LinearPlan, stored: Naming) -> tuple[Source, ...]:
    """The modules of a linear; adapters that were made for the class that wrote the checkpoint know them as it does."""
    sources, column = [], 0
    for cut in plan.cuts:
        rows = indices(cut.rows)
        cols = None if cut.cols == ((0, cut.in_features),) else indices(cut.cols)
        # Adapters know a tensor that is no module's weight by its parameter only.
        module = cut.alias.parameter if cut.bare and cut.alias is not None else cut.module
        sources.append(Source(module, rows, column, cols, cut.out_features, cut.in_features, cut.alias, cut.flipped, stored(module)))
        column += len(rows)
    return tuple(sources)
