"""Steps that nobody asked for: what is set up on first use is set up by them, and how much memory a step takes is seen from them."""

from __future__ import annotations

from kvrun.engine.batch import Work
from kvrun.engine.looked import LookedImages
from kvrun.engine.sampling import MOST_ALTERNATIVES, Sampling
from kvrun.engine.sequence import Admit, Row, Sequence
from kvrun.engine.source import Source
from kvrun.lora.adapter import Adapter
from kvrun.nn.loaded import LoadedModel

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

    One row is the end of as long a prompt as there may be, every other one token; all are scored, and sampled in the
    costliest way.
    """
    rows = min(rows, tokens)
    count = min(tokens - rows + 1, model.positions or ENDLESS)
    start = max(model.positions or ENDLESS, count) - count
    first = pretend(model, count, page_tokens, start, COSTLY, adapter)
    return [first, *(pretend(model, 1, page_tokens, 0, COSTLY, adapter) for _ in range(rows - 1))]
