#!/usr/bin/env python3
"""Decode and prefill of a well-known shape on this machine's CPU or GPU, engine alone, beside its limits and beside others.

    shapes.py 8b --device cuda          # writes random weights to a folder of its own first
    shapes.py 160m --model /tmp/160m    # a folder of make_model.py, with adapters

Prints a table: one stream, many streams, as many with an adapter each, on a GPU the same without captured graphs, and the first
token of a prompt; then transformers, and vLLM where it is installed. There is no router and no HTTP in it. Steps are launched
as the router sends them where steps overlap: the next one before the outcome of the last is taken. A step's bytes are those of
all weights but the embedding; a prompt's operations are two for each token and weight of the layers.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from kvrun import device as devices
from kvrun.dist import Group
from kvrun.engine.engine import Engine
from kvrun.engine.memory import MemoryBudget
from kvrun.engine.sampling import Sampling
from kvrun.engine.sequence import Admit, Placement, Row, Step
from kvrun.nn.build import load_model
from kvrun_kernels.bench import MATMUL, MATMUL_ON_GPU, Clock, matmul_rate, read_rate, stream_rate
from load import prompt
from make_model import SHAPES, VOCABULARIES, VOCABULARY, write_adapter, write_model

PAGE_TOKENS, PROMPT, FIRST = 16, 1024, 16  # tokens of a page, of the long prompt, and of streams' prompts
WARM = 4  # steps before any is measured


@dataclass(frozen=True)
class Limits:
    """What the device can do at most: bytes read and operations computed in a second."""

    read: float
    arithmetic: float


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    what: str
    tokens_per_s: float
    share: float | None  # of the limit that bounds it

    def __str__(self) -> str:
        return f"| {self.what} | {self.tokens_per_s:,.1f} | {'' if self.share is None else f'{self.share:.0%}'} |"


class Streams:
    """Sequences that one engine computes side by side, each in pages of its own, with adapters from 1 on or none."""

    def __init__(self, engine: Engine, count: int, tokens: int, adapters: int = 0) -> None:
        """tokens: the most that each comes to"""
        self._engine, self._number = engine, 0
        self._each = -(-tokens // PAGE_TOKENS)
        self._count, self._adapters, self._start = count, adapters, 0

    def begin(self, ids: list[list[int]], places: list[Placement]) -> Step:
        """The step that reads every prompt whole."""
        admit = [Admit(n, tokens, len(tokens), Sampling(), 1 + n % self._adapters if self._adapters else 0) for n, tokens in enumerate(ids)]
        self._start = len(ids[0])
        return self._step([len(tokens) for tokens in ids], 0, admit, places)

    def advance(self) -> Step:
        """The step that computes one more token of each."""
        self._start += 1
        return self._step([1] * self._count, self._start - 1)

    def _step(self, tokens: list[int], start: int, admit: list[Admit] = [], places: list[Placement] = []) -> Step:  # noqa: B006
        self._number += 1
        rows = []
        for n, count in enumerate(tokens):
            held, end = -(-start // PAGE_TOKENS), -(-(start + count) // PAGE_TOKENS)
            rows.append(Row(n, start, count, range(n * self._each + held, n * self._each + end), True, ()))
        return Step(self._number, [], admit, rows, [], places)


def seconds_of_steps(engine: Engine, streams: int, steps: int, adapters: list[Path] = []) -> float:  # noqa: B006
    """The median time of a decoding step, from outcome to outcome."""
    tokens = FIRST + WARM + steps + 1
    side = Streams(engine, streams, tokens, len(adapters))
    places = _reserve(engine, streams * -(-tokens // PAGE_TOKENS), FIRST * streams, streams, adapters)
    turns = [engine.launch(side.begin([prompt(FIRST, n) for n in range(streams)], places))]
    times: list[float] = []
    for _ in range(WARM + steps):
        turns.append(engine.launch(side.advance(), lambda: None))
        turns.pop(0).outcome()
        times.append(time.perf_counter())
    turns.pop().outcome()
    return statistics.median(after - before for before, after in pairwise(times[WARM - 1 :]))


def seconds_of_prompt(engine: Engine, tokens: int, times: int = 4) -> float:
    """The median time from a prompt to its first token, the first of them not counted."""
    took = []
    for number in range(times):
        side = Streams(engine, 1, tokens + 1)
        _reserve(engine, -(-(tokens + 1) // PAGE_TOKENS), tokens, 1, [])
        began = time.perf_counter()
        engine.step(side.begin([prompt(tokens, "long", number)], []))
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def _reserve(engine: Engine, pages: int, tokens: int, rows: int, adapters: list[Path]) -> list[Placement]:
    """Begin anew with these adapters; where they are to be placed, behind the pages of sequences."""
    room = 2 * sum(path.stat().st_size for folder in adapters for path in folder.glob("*.safetensors"))
    more = -(-room // engine.page_bytes) if engine.places_adapters else 0
    engine.reserve(pages + more, tokens, rows, room)
    places = []
    for handle, folder in enumerate(adapters, 1):
        loaded = engine.adapters.load(handle, folder.name, str(folder))
        if engine.places_adapters:
            places.append(Placement(handle, pages))
            pages += loaded.pages
    return places


def limits(place: str) -> Limits:
    """Measured by the kernels' own benchmark."""
    clock = Clock(0.3, done=torch.cuda.synchronize if place == "cuda" else lambda: None)
    side = MATMUL_ON_GPU if place == "cuda" else MATMUL
    with torch.inference_mode(), torch.device(place):
        return Limits(max(stream_rate(clock), read_rate(clock)), max(matmul_rate(d, clock, side) for d in (torch.float32, torch.bfloat16)))


def ours(folder: Path, place: str, streams: int, steps: int, bound: Limits) -> Iterator[Line]:
    """This server's engine, with the model's adapters."""
    device = devices.choose(place, 0)
    device.begin()
    adapters = sorted((folder / "adapters").glob("*"))
    model = load_model(folder, dtype="bfloat16", device=device)
    embedding = model.vocabulary * model.config.hidden_size * model.dtype.itemsize
    step_bytes = model.weight_bytes - embedding
    for sizes in ([1, streams], []) if device.captures else ([],):
        engine = Engine(model, Group.single(), MemoryBudget(free=device.free_bytes), PAGE_TOKENS, captured=sizes)
        engine.warm()
        how = "" if sizes or not device.captures else ", without graphs"
        one = seconds_of_steps(engine, 1, steps)
        yield Line(f"kv.run, one stream{how}", 1 / one, step_bytes / one / bound.read)
        yield Line(f"kv.run, {streams} streams{how}", streams / seconds_of_steps(engine, streams, steps), None)
        if adapters:
            took = seconds_of_steps(engine, streams, steps, adapters)
            yield Line(f"kv.run, {streams} streams over {len(adapters)} adapters{how}", streams / took, None)
    took = seconds_of_prompt(engine, PROMPT)
    operations = (step_bytes - embedding) / model.dtype.itemsize * 2 * PROMPT  # the head computes one token
    yield Line(f"kv.run, prompt of {PROMPT}", PROMPT / took, operations / took / bound.arithmetic)


def transformers(folder: Path, place: str, streams: int, steps: int, bound: Limits) -> Iterator[Line]:
    """Its `generate`, with its cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(place).eval()
    step_bytes = sum(parameter.nbytes for parameter in model.parameters()) - model.get_input_embeddings().weight.nbytes

    def answer(prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts, device=place)
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )

    yield from _by_difference("transformers", answer, streams, steps, step_bytes, bound)


def vllm(folder: Path, place: str, streams: int, steps: int, bound: Limits) -> Iterator[Line]:
    """Its offline engine."""
    library = importlib.import_module("vllm")
    server = library.LLM(str(folder), dtype="bfloat16", max_model_len=2 * PROMPT, enable_prefix_caching=False, gpu_memory_utilization=0.5)

    def answer(prompts: list[list[int]], tokens: int) -> None:
        asked = library.SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
        server.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)

    yield from _by_difference("vLLM", answer, streams, steps, None, bound)


def _by_difference(
    name: str, answer: Callable[[list[list[int]], int], None], streams: int, steps: int, step_bytes: int | None, bound: Limits
) -> Iterator[Line]:
    """A server that answers whole: a step is what more tokens take longer."""

    def seconds(prompts: list[list[int]], tokens: int) -> float:
        began = time.perf_counter()
        answer(prompts, tokens)
        return time.perf_counter() - began

    for count in (1, streams):
        prompts = [prompt(FIRST, n) for n in range(count)]
        answer(prompts, WARM)
        step = (seconds(prompts, 1 + steps) - seconds(prompts, 1)) / steps
        share = step_bytes / step / bound.read if step_bytes and count == 1 else None
        yield Line(f"{name}, {f'{count} streams' if count > 1 else 'one stream'}", count / step, share)
    took = statistics.median(seconds([prompt(PROMPT, "long", number)], 1) for number in range(4))
    yield Line(f"{name}, prompt of {PROMPT}", PROMPT / took, None)


@contextmanager
def model_of(shape: str, given: Path | None, adapters: int) -> Iterator[Path]:
    """The folder that was given, or one that is gone afterwards."""
    if given:
        yield given
        return
    with TemporaryDirectory() as folder:
        write_model(Path(folder), SHAPES[shape], VOCABULARIES.get(shape, VOCABULARY), context=4 * PROMPT, seed=0)
        for n in range(adapters):
            write_adapter(Path(folder) / "adapters" / f"lora{n}", SHAPES[shape], (8, 16)[n % 2], seed=1 + n)
        yield Path(folder)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--model", type=Path, help="a folder of that shape; without it one is written and removed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--steps", type=int, default=64)
    args = parser.parse_args()
    ways = [ours, transformers, *([vllm] if importlib.util.find_spec("vllm") else [])]
    bound = limits(args.device)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{args.shape} on {where}: reads {bound.read / 1e9:,.0f} GB/s, multiplies {bound.arithmetic / 1e12:,.2f} TFLOP/s\n")
    print("| what | tokens/s | of the limit |\n|---|---|---|")
    with model_of(args.shape, args.model, args.streams) as folder:
        for way in ways:
            try:
                for line in way(folder, args.device, args.streams, args.steps, bound):
                    print(line, flush=True)
            except Exception as error:  # another server's failure is a line of the table, ours is the end
                if way is ours:
                    raise
                print(f"| {way.__name__}: {type(error).__name__}: {error} | | |", flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
