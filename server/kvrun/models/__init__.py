"""One file per family of architectures. Importing this package registers all of them."""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from kvrun.spec import Config, Model, model_of

for _family in iter_modules(__path__):
    import_module(f"{__name__}.{_family.name}")


def read(folder: str | Path) -> tuple[Config, Model]:
    """The config and the description of the model in a folder; opens no weights."""
    config = Config.read(folder)
    return config, model_of(config)
