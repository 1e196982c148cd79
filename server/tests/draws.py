"""How much of what transformers answers hangs on the last bit of a float32, by which the seeds of `tiny.ROWS` were chosen.

    PYTHONPATH=server:server/tests python server/tests/draws.py [--first N] [ROW...]

prints that for each row's own seed, or, from seed N on, the first seed with which it is no more than SETTLED, as with every row's own.
All of it is computed by transformers and peft: what this server answers chooses no draw.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from adapters import peft_model, write_adapter
from kvrun import models
from pictures import PARTS, Oracle, prompt
from test_lora_rows import ADAPTER, ASKED
from test_moe import PARAMETERS, PREFIXES, experts_adapters
from test_parity import prompts
from tiny import ROWS, distance, oracle_model, row_of, write_checkpoint
from wide import wide

SETTLED = 5e-5  # standard deviations of the logits
NUDGES = 4
Logits = Callable[[torch.nn.Module], torch.Tensor]


def moved(model: torch.nn.Module, logits: Logits) -> Iterator[float]:
    """How far logits in float32 lie from those in float64: with the weights as they are, then with one in eight changed in its last bit."""
    exact = deepcopy(model).double()
    for module in exact.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"  # the others know no float64
    with torch.inference_mode():
        with wide():
            reference = logits(exact)
        assert reference.dtype == torch.float64
        yield distance(logits(model), reference)
        for seed in range(NUDGES):
            generator, nudged = torch.Generator().manual_seed(seed), deepcopy(model)
            for parameter in nudged.parameters():
                parameter *= 1 + torch.randint(-8, 9, parameter.shape, generator=generator).div(8, rounding_mode="trunc") * 2**-23
            yield distance(logits(nudged), reference)


def asked(row: str, seed: int, folder: Path) -> Iterator[tuple[torch.nn.Module, Logits]]:
    """The models of a draw of weights and what tests ask of them: text, text with adapters, text with images."""
    checkpoint = write_checkpoint(row, folder / "checkpoint", seed=seed)

    def text(asked: Sequence[list[int]], model: torch.nn.Module) -> torch.Tensor:
        return torch.cat([row_of(checkpoint).logits(model, torch.tensor([ids]))[0] for ids in asked])

    yield oracle_model(checkpoint), partial(text, prompts())
    if ROWS[row].published is None:
        yield peft_model(checkpoint, write_adapter(folder / "adapter", checkpoint, **ADAPTER)), partial(text, ASKED)
    if row in PARAMETERS:
        for adapter in experts_adapters(row, checkpoint, folder / "experts"):
            yield peft_model(checkpoint, adapter), partial(text, prompts(lengths=PREFIXES))
    images = models.read(checkpoint)[1].images
    if images is not None:
        shown = Oracle(checkpoint)

        def pictures(model: torch.nn.Module) -> torch.Tensor:
            shown.model = model
            lines = [shown.logits(prompt(images, parts)[0], [p for p in parts if isinstance(p, bytes)]) for parts in PARTS.values()]
            return torch.cat(lines)

        yield shown.model, pictures


def condition(row: str, seed: int, most: float = float("inf")) -> float:
    """The farthest that any logits of a draw of weights move; looks no further once that is more than `most`."""
    worst = 0.0
    with TemporaryDirectory() as folder:
        for model, logits in asked(row, seed, Path(folder)):
            for found in moved(model, logits):
                worst = max(worst, found)
                if worst > most:
                    return worst
    return worst


def main(arguments: list[str]) -> None:
    """See the module."""
    torch.set_num_threads(1)
    first = int(arguments[1]) if arguments[:1] == ["--first"] else None
    for row in arguments[2 * (first is not None) :] or ROWS:
        if first is None:
            print(f"{row}, seed {ROWS[row].seed}: {condition(row, ROWS[row].seed):.1e}", flush=True)
        else:
            seed = next(seed for seed in count(first) if condition(row, seed, SETTLED) <= SETTLED)
            print(f"{row}: seed {seed}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
