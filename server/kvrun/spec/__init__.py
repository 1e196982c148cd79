"""The vocabulary in which an architecture is described: values only, standard library only.

A model file reads a `Config` and returns a `Model`; its import list is the architecture's summary.
"""

from kvrun.spec.config import Config
from kvrun.spec.describe import describe
from kvrun.spec.encoder import CrossAttention, Encoder, SourceAttention
from kvrun.spec.latent import LatentAttention, LowRank
from kvrun.spec.mixers import Attention, GatedMlp, Mixer, Mlp
from kvrun.spec.model import Decoder, Embed, Head, Layer, Model, Parallel, PostNorm, Residual, Step, UnitHead, stack
from kvrun.spec.moe import (
    ClampedSwiGlu,
    EachExpert,
    ExpertLayout,
    FlatExperts,
    Gated,
    GroupedSigmoid,
    GroupedSoftmax,
    Moe,
    PlainGroupedSigmoid,
    Router,
    SoftmaxTopK,
    SparseMixer,
    StackedExperts,
    TopKSoftmax,
)
from kvrun.spec.norms import EachHeadNorm, HeadNorm, LayerNorm, Norm, ProjectionNorm, QueryKeyNorm, RmsNorm
from kvrun.spec.positions import (
    Alibi,
    DynamicScaling,
    Learned,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RelativeBias,
    Rope,
    TwoSidedBias,
    YarnScaling,
)
from kvrun.spec.recurrent import Convolution, Mamba, Mamba2
from kvrun.spec.registry import architecture, model_of, served
from kvrun.spec.weights import Fused, Packed, Stored, fuse, linear, packed, transposed

__all__ = [
    "Alibi",
    "Attention",
    "ClampedSwiGlu",
    "Config",
    "Convolution",
    "CrossAttention",
    "Decoder",
    "DynamicScaling",
    "EachExpert",
    "EachHeadNorm",
    "Embed",
    "Encoder",
    "ExpertLayout",
    "FlatExperts",
    "Fused",
    "Gated",
    "GatedMlp",
    "GroupedSigmoid",
    "GroupedSoftmax",
    "Head",
    "HeadNorm",
    "LatentAttention",
    "Layer",
    "LayerNorm",
    "Learned",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "LowRank",
    "Mamba",
    "Mamba2",
    "Mixer",
    "Mlp",
    "Model",
    "Moe",
    "Norm",
    "Packed",
    "Parallel",
    "PlainGroupedSigmoid",
    "PostNorm",
    "ProjectionNorm",
    "QueryKeyNorm",
    "RelativeBias",
    "Residual",
    "RmsNorm",
    "Rope",
    "Router",
    "SoftmaxTopK",
    "SourceAttention",
    "SparseMixer",
    "StackedExperts",
    "Step",
    "Stored",
    "TopKSoftmax",
    "TwoSidedBias",
    "UnitHead",
    "YarnScaling",
    "architecture",
    "describe",
    "fuse",
    "linear",
    "model_of",
    "packed",
    "served",
    "stack",
    "transposed",
]
