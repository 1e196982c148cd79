"""The modules of every kind of mixer, one file per kind. Importing this package registers all of them."""

from importlib import import_module
from pkgutil import iter_modules

for _kind in iter_modules(__path__):
    import_module(f"{__name__}.{_kind.name}")
