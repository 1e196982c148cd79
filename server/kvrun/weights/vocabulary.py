"""How many of a model's vocabulary rows stand for tokens. The rest pad the matrix and must never be sampled."""

from __future__ import annotations

import json
from pathlib import Path


def vocabulary_limit(folder: str | Path, vocabulary: int) -> int:
    """One more than the highest id in tokenizer.json, at most `vocabulary`, which it is without that file.

    Reads ids only: what they mean is the router's business, which also says what is wrong with an unreadable tokenizer.
    """
    try:
        stated = json.loads((Path(folder) / "tokenizer.json").read_bytes())
        known = stated["model"]["vocab"]
        ids = list(known.values()) if isinstance(known, dict) else [len(known) - 1]
        ids += [token["id"] for token in stated.get("added_tokens") or []]
        return min(vocabulary, max(ids) + 1)
    except (OSError, ValueError, KeyError, TypeError):
        return vocabulary
