"""The README's table of what is supported, made from the registry and from the rows that the tests cover.

`python server/tests/support_table.py` rewrites the table in place (`make docs`); a test fails when it is stale.
"""

import inspect
import re
import sys
from pathlib import Path

from kvrun import (
    gguf,
    models,  # noqa: F401  (importing the package registers every family)
)
from kvrun.quant import registry as formats
from kvrun.spec import registry
from ragged import WORLDS
from tiny import ROWS
from tiny.row import Row

README = Path(__file__).resolve().parents[2] / "README.md"
SNAPSHOTS = Path(__file__).parent / "snapshots"
START, END = "<!-- support table: make docs -->\n", "<!-- end of support table -->"


def architecture_of(row: Row) -> str:
    """The class name in `architectures` of a row's published checkpoints."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return row.architecture or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[row.kind]


def table() -> str:
    """One line for each family of architectures, then the weight formats."""
    tested: dict[str, list[str]] = {}
    for name, row in ROWS.items():
        tested.setdefault(architecture_of(row), []).append(name)
    families: dict[str, list[str]] = {}
    for name in registry.served():
        families.setdefault(registry.describer(name).__module__, []).append(name)
    lines = [
        f"{len(ROWS)} tiny models stand for {len(registry.served())} architectures. Each is compared, at {WORLDS[0]} to {WORLDS[-1]} "
        "ranks, with transformers' logits and greedy answers, and with peft's where an adapter changes every linear, "
        "the embedding and the head: in float32 by the kernels that serve, and in float64, where both agree to 9 digits and more.",
        "",
        "| family | architectures | compared as | takes | keeps |",
        "|---|---|---|---|---|",
    ]
    for module, names in sorted(families.items()):
        rows = [row for name in names for row in tested.get(name, [])]
        file = f"server/kvrun/{module.removeprefix('kvrun.').replace('.', '/')}.py"
        title = (inspect.getdoc(sys.modules[module]) or "").split("\n")[0].split(":")[0].rstrip(".")
        architectures = ", ".join(f"`{name}`" for name in names)
        takes = "text, images" if any(ROWS[row].auto == "AutoModelForImageTextToText" for row in rows) else "text"
        lines.append(f"| [{title}]({file}) | {architectures} | {', '.join(rows)} | {takes} | {_keeps(rows)} |")
    stored, made = formats.names()
    lines += [
        "",
        f"Weights: float32, bfloat16, float16; read as published: {', '.join(stored)}; "
        f"made while loading by `--quantize`: {', '.join(made)}.",
        "",
        f"GGUF files of the architectures {', '.join(gguf.known())}.",
    ]
    return "\n".join(lines) + "\n"


def _keeps(rows: list[str]) -> str:
    """What a sequence leaves on a shard, as the rows' descriptions say."""
    text = "".join((SNAPSHOTS / f"{row}.txt").read_text() for row in rows)
    kinds = {"pages": r"Attention ", "slots": r"Mamba", "memory": r"CrossAttention| memory="}
    return ", ".join(kind for kind, pattern in kinds.items() if re.search(pattern, text))


def renewed(text: str) -> str:
    """The README's text with the table of today."""
    return re.sub(re.escape(START) + ".*?" + re.escape(END), START + table() + END, text, flags=re.S)


if __name__ == "__main__":
    README.write_text(renewed(README.read_text()))
