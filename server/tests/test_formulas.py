"""Every row computes what transformers and peft compute, to the last digits of float64, whatever its weights.

In float32 both round, and with weights as large as these some answers hang on a last bit; so `test_parity` and its like choose their
draws, and a few rows have smaller matrices there. Here nothing is chosen and nothing made smaller. Both sides compute in float64, this
server by its plain references, to which the tests of the kernels hold the native ones.
"""

from functools import cache

import peft  # noqa: F401  (see `wide`)
import pytest
import torch
from adapters import peft_model, write_adapter
from driver import Ranks
from pictures import PARTS, Oracle, prompt
from ragged import WORLDS
from test_images import ROWS as SEEING
from test_images import expected, logits_of
from test_lora_rows import ADAPTER, ASKED
from test_moe import PARAMETERS, experts_adapters
from test_parity import prompts
from tiny import ROWS, distance, oracle_model, row_of, write_checkpoint
from wide import wide

EXACT = 1e-9  # standard deviations of the logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """row -> its folder in float64, with the first weights that were drawn."""

    @cache
    def folder(row):
        write_checkpoint(row, tmp_path_factory.mktemp(row))  # which imports what transformers makes it of
        with wide():
            return write_checkpoint(row, tmp_path_factory.mktemp(row), seed=0, settled=False)

    return folder


@pytest.fixture
def runner(groups, checkpoint, request):
    """The runners of as many ranks as the test's `world`, in float64 like everything in the test."""
    runner = groups[request.getfixturevalue("world")]
    checkpoint(request.getfixturevalue("row"))
    runner.widen()
    yield runner
    runner.narrow()


def exactly(model, folder, asked):
    """A model's logits of prompts, laid end to end."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"  # the others know no float64
    with torch.inference_mode():
        return torch.cat([row_of(folder).logits(model, torch.tensor([ids]))[0] for ids in asked])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("row", ROWS)
def test_logits_are_transformers_own_to_the_last_digits(row, world, runner, checkpoint):
    folder = checkpoint(row)
    runner.load(folder)
    logits = runner.step(list(enumerate(prompts())))
    assert logits.dtype == torch.float64
    far = distance(logits, exactly(oracle_model(folder), folder, prompts()))
    print(f"{row}, world {world}: {far:.1e} of the logits' standard deviation")
    assert far < EXACT


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("row", [row for row in ROWS if ROWS[row].published is None])
def test_logits_with_adapters_are_peft_s_own_to_the_last_digits(row, world, runner, checkpoint, tmp_path):
    folder = checkpoint(row)
    runner.load(folder)
    adapters = [write_adapter(tmp_path / "everything", folder, **ADAPTER)]
    if row in PARAMETERS:
        adapters += experts_adapters(row, folder, tmp_path / "experts")
    for number, adapter in enumerate(adapters):
        runner.adapt(adapter, [100 * number + n for n in range(len(ASKED))])
    logits = runner.step([(100 * number + n, ids) for number in range(len(adapters)) for n, ids in enumerate(ASKED)])
    for adapter, found in zip(adapters, logits.chunk(len(adapters)), strict=True):
        far = distance(found, exactly(peft_model(folder, adapter), folder, ASKED))
        print(f"{row}, world {world}, {adapter.name}: {far:.1e} of the logits' standard deviation")
        assert far < EXACT


@pytest.mark.parametrize("row", SEEING)
def test_logits_of_text_and_images_are_transformers_own_to_the_last_digits(row, checkpoint, heard):
    folder = checkpoint(row)
    ranks = Ranks(folder, arithmetic=wide)
    ranks.reserve()
    with wide():
        oracle = Oracle(folder)
        prompts = [prompt(ranks.engines[0].model.spec.images, parts) for parts in PARTS.values()]
        found = zip(prompts, PARTS.values(), logits_of(ranks, prompts, heard))
        far = max(distance(logits, expected(oracle, tokens, parts)) for (tokens, _), parts, logits in found)
    print(f"{row}: {far:.1e} of the logits' standard deviation")
    assert far < EXACT
