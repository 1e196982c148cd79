"""The README's table of what is supported, made from the registry and from the rows that the tests cover.

`python server/tests/support_table.py` rewrites the table in place (`make docs`); a test fails when it is stale.
"""

import re
from pathlib import Path

from kvrun import models  # noqa: F401  (importing the package registers every family)
from kvrun.spec import registry
from tiny import ROWS
from tiny.row import Row

README = Path(__file__).resolve().parents[2] / "README.md"
START, END = "<!-- support table: make docs -->\n", "<!-- end of support table -->"
RANKS = "1 to 4"  # the worlds of test_parity.py
SERVED = "every linear of a layer | float32; bfloat16 and float16 by the kernels' tests only"


def architecture_of(row: Row) -> str:
    """The class name in `architectures` of a row's published checkpoints."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return row.architecture or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[row.kind]


def table() -> str:
    """One line for each architecture: the families, where it is described, and what it is tested as."""
    tested: dict[str, list[str]] = {}
    for name, row in ROWS.items():
        tested.setdefault(architecture_of(row), []).append(name)
    lines = [
        "| architecture | described in | compared with transformers as | ranks | LoRA | weights | in, out |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in registry.served():
        describer = registry.describer(name)
        source = f"server/kvrun/{describer.__module__.removeprefix('kvrun.').replace('.', '/')}.py"
        rows = ", ".join(tested.get(name, [])) or "the same description as its neighbour"
        sees = any(ROWS[row].auto == "AutoModelForImageTextToText" for row in tested.get(name, []))
        carries = "text and images, text" if sees else "text"
        lines.append(f"| `{name}` | [{Path(source).name}]({source}) | {rows} | {RANKS} | {SERVED} | {carries} |")
    return "\n".join(lines) + "\n"


def renewed(text: str) -> str:
    """The README's text with the table of today."""
    return re.sub(re.escape(START) + ".*?" + re.escape(END), START + table() + END, text, flags=re.S)


if __name__ == "__main__":
    README.write_text(renewed(README.read_text()))
