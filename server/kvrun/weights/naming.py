"""Where a checkpoint's names differ from the declared ones by a prefix, as saved by another class around or inside it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from kvrun.spec import Model
from kvrun.weights.plan import first_norm, join

OUTER = ("model.", "transformer.", "language_model.", "language_model.model.", "model.language_model.")


@dataclass(frozen=True)
class Naming:
    """Declared names that begin with `declared` are stored beginning with `stored`, those of `moves` as it says."""

    declared: str = ""
    stored: str = ""
    moves: tuple[tuple[str, str], ...] = ()  # declared and stored beginnings

    def __call__(self, name: str) -> str:
        """The stored name of a declared one."""
        for declared, stored in (*self.moves, (self.declared, self.stored)):
            if name.startswith(declared):
                return stored + name[len(declared) :]
        return name


def probe(model: Model, names: Collection[str]) -> Naming:
    """Find the prefix under which a checkpoint stores this model, by looking for one tensor that every file must have.

    Parts that are spelled in several ways take the longest of them that the checkpoint knows.
    """
    moves = _moves(model, names)
    embed, layers = model.decoder.embed, model.decoder.layers
    base = embed.name[: embed.name.rfind(".") + 1]
    known = [f"{embed.name}.weight"]
    norm = first_norm(layers[0]) if layers else None
    known += [f"{join(layers[0].at, norm.name)}.weight"] if norm is not None else []
    inner = [base[i + 1 :] for i, character in enumerate(base) if character == "."]  # "model.decoder." -> "decoder.", ""
    for stored in (base, *inner, *(outer + rest for outer in OUTER for rest in (base, *inner))):
        naming = Naming(base, stored, moves)
        if any(naming(name) in names for name in known if name.startswith(base)):
            return naming
    return Naming(moves=moves)


def _moves(model: Model, names: Collection[str]) -> tuple[tuple[str, str], ...]:
    spelled: dict[str, list[str]] = {}
    for declared, stored in model.spellings:
        spelled.setdefault(declared, [declared]).append(stored)
    known = {declared: [s for s in ways if any(name.startswith(s) for name in names)] for declared, ways in spelled.items()}
    return tuple((declared, max(ways, key=len)) for declared, ways in known.items() if ways)
