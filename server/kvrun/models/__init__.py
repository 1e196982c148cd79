"""One file per family of architectures. Importing this package registers all of them."""

from pathlib import Path

from kvrun.models import falcon, gpt2, llama, mistral, qwen2
from kvrun.spec import Config, Model, model_of

__all__ = ["falcon", "gpt2", "llama", "mistral", "qwen2", "read"]


def read(folder: str | Path) -> tuple[Config, Model]:
    """The config and the description of the model in a folder; opens no weights."""
    config = Config.read(folder)
    return config, model_of(config)
