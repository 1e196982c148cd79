"""Which function describes which architecture."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from kvrun.errors import ConfigError, Unsupported
from kvrun.spec.config import Config
from kvrun.spec.model import Model

Describer = Callable[[Config], Model]
_describers: dict[str, Describer] = {}


def architecture(*names: str) -> Callable[[Describer], Describer]:
    """Register the decorated function as the description of these `architectures` entries of a config.json."""

    def register(describe: Describer) -> Describer:
        for name in names:
            if name in _describers:
                raise ValueError(f"architecture {name} is described twice")
            _describers[name] = describe
        return describe

    return register


def served() -> list[str]:
    """The architectures that can be served, sorted."""
    return sorted(_describers)


def describer(name: str) -> Describer:
    """The function that describes a served architecture."""
    return _describers[name]


def model_of(config: Config) -> Model:
    """The model a config describes. Unsupported names the nearest served ones when nobody describes its architecture."""
    name = config.architecture
    describe = _describers.get(name)
    if describe is None:
        near = difflib.get_close_matches(name, served(), n=3, cutoff=0.4)
        hint = f"the nearest served ones are {', '.join(near)}" if near else f"served are {', '.join(served())}"
        raise Unsupported(f"{config.where}: architecture {name} is not served; {hint}")
    try:
        return describe(config)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{config.where}: its values do not describe a {name}: {error}") from error
