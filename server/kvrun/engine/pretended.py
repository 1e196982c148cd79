"""Steps that nobody asked for: what is set up on first use is set up by them, and how much memory a step takes is seen from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvrun.engine.batch import Work
from kvrun.engine.images import Image, SequenceImages
from kvrun.engine.looked import LookedImages
from kvrun.engine.sampling import MOST_ALTERNATIVES, Sampling
from kvrun.engine.sequence import Admit, Row, Sequence
from kvrun.engine.source import Source
from kvrun.lora.adapter import Adapter
from kvrun.nn.loaded import LoadedModel

if TYPE_CHECKING:
    from kvrun.nn.vision.sight import Sight

# Images of one request, as the router admits them.
MOST_IMAGES = 16
# Positions of a sequence whose model has no limit of its own.
ENDLESS = 32_768
# All that a client may ask of a token and that holds another copy of its logits.
COSTLY = Sampling(
    temperature=1.0, top_p=0.999, repetition_penalty=1.1, frequency_penalty=0.1, top_logprobs=MOST_ALTERNATIVES, prompt_logprobs=True
)


def pretend(
    model: LoadedModel, tokens: int, page_tokens: int, start: int = 0, sampling: Sampling | None = None, adapter: Adapter | None = None
) -> Work:
    """The last `tokens` of a prompt, `start` of them before, sampled after. Whatever the model keeps lies in page 0 and slot 0.

    A model with an encoder is given a source as long as the prompt.
    """
    length = start + tokens
    sequence = Sequence(Admit(0, [0] * length, length, sampling or Sampling(), 0), adapter)
    sequence.append_pages([0] * -(-length // page_tokens))
    sequence.slot = 0 if model.slot_shapes else None
    if model.sight is not None and model.spec.images is not None and model.spec.images.memory:
        sequence.images = LookedImages((), model.sight, length, (), page_tokens)
    if model.encoder is not None:
        sequence.source = Source(sequence.ids, sequence.pages)
    return Row(0, start, tokens, (), True, ()), sequence


def largest(model: LoadedModel, tokens: int, rows: int, page_tokens: int, adapter: Adapter) -> list[Work]:
    """What takes the most memory of all that steps of so many tokens and rows may be.

    One row is the end of as long a prompt as there may be, of images where the model takes some, every other one token; all are
    scored, and sampled in the costliest way. A source is as long as a step may have one.
    """
    rows = min(rows, tokens)
    count = min(tokens - rows + 1, model.positions or ENDLESS)
    start = max(model.positions or ENDLESS, count) - count
    row, first = pretend(model, count, page_tokens, start, COSTLY, adapter)
    if model.sight is not None:
        _show(model.sight, row, first, page_tokens)
    if first.source is not None:
        first.source = Source(first.ids[:tokens], first.pages)
    return [(row, first), *(pretend(model, 1, page_tokens, 0, COSTLY, adapter) for _ in range(rows - 1))]


def _show(sight: Sight, row: Row, sequence: Sequence, page_tokens: int) -> None:
    """Have a row's tokens show as many images as they may, up to the last token, each as large as there may be."""
    data, token, end = sight.largest(), sight.spec.token, row.start + row.tokens
    if sight.spec.memory:
        each, count = 1, min(row.tokens, MOST_IMAGES)
    else:
        # One whose tokens see each other is shown whole; of others the row may show but the end.
        each = len(sight.features(data))
        count = row.tokens // each if sight.spec.together else min(-(-row.tokens // each), end // each)
    images = [Image(data, end - each * left, each) for left in range(count, 0, -1)]
    sequence.ids[end - each * count :] = token
    if sight.spec.memory:
        pages = [0] * (count * sight.memory_tokens(page_tokens) // page_tokens)
        sequence.images = LookedImages(images, sight, end, pages, page_tokens)
    else:
        sequence.images = SequenceImages(images, sight, end)
