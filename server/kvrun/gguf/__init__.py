"""GGUF files: their container, and what their metadata and names stand for. Knows no tensors and no models."""

import kvrun.gguf.architectures  # noqa: F401  (registers the tables)
from kvrun.gguf.architecture import architecture_of, known
from kvrun.gguf.container import PART, PLAIN, TYPES, Container, Tensor, Type
from kvrun.gguf.folder import holds_gguf, is_gguf, models_in, prepared
from kvrun.gguf.names import Place, places, rows

__all__ = [
    "PART",
    "PLAIN",
    "TYPES",
    "Container",
    "Place",
    "Tensor",
    "Type",
    "architecture_of",
    "holds_gguf",
    "is_gguf",
    "known",
    "models_in",
    "places",
    "prepared",
    "rows",
]
