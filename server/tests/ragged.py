"""Runs a loaded model over sequences in any mixture of chunks, and the same in a group of real processes."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from kvrun.dist import Group
from kvrun.lora.adapter import Adapter, read_adapter
from kvrun.lora.table import LoraBatch, Run
from kvrun.nn.batch import ForwardBatch, MemoryRows, SlotRows
from kvrun.nn.build import load_model
from tiny.row import SOURCE
from wide import wide

PAGE_TOKENS, PAGES, SLOTS = 4, 512, 64
WORLDS = (1, 2, 3, 4)


class Runner:
    """One rank: a model, its pool, and the pages and length of every sequence."""

    def __init__(self, group: Group | None = None) -> None:
        self.group = group or Group.single()
        self._arithmetic = ExitStack()

    def widen(self) -> None:
        """Compute in float64 what is loaded from here on."""
        self._arithmetic.enter_context(wide())

    def narrow(self) -> None:
        """Compute as ever again."""
        self._arithmetic.close()

    def load(self, folder: Path, dtype: str = "float32", **how: object) -> None:
        """Load a model and forget every sequence. how: what load_model takes beside these"""
        self.model = load_model(folder, dtype=dtype, group=self.group, **how)
        self.kv = self.model.pool(PAGES, PAGE_TOKENS, sequences=SLOTS)
        # Scattered pages: a kernel that took a sequence's pages to be adjacent would be seen.
        self.free = torch.randperm(PAGES, generator=torch.Generator().manual_seed(0)).tolist()
        self.pages: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self.most: dict[int, int] = {}  # tokens that each sequence may come to
        self.adapters: dict[int, Adapter] = {}
        self.slots: dict[int, int] = {}
        self.sources: dict[int, list[int]] = {}
        self.memories: dict[int, list[int]] = {}

    def adapt(self, folder: Path, sequences: list[int]) -> None:
        """Give these sequences an adapter."""
        model = self.model
        place = model.device.place
        adapter = read_adapter(folder, model.linears, model.dtype, model.decoder.embed, place).carried(lambda matrix: matrix.to(place))
        self.adapters |= dict.fromkeys(sequences, adapter)

    def expect(self, most: dict[int, int]) -> None:
        """Say how many tokens each of these sequences may come to, where that is not what its first step brings."""
        self.most |= most

    def _lora(self, rows: list[tuple[int, list[int]]]) -> LoraBatch | None:
        runs, start = [], 0
        for sequence, tokens in rows:
            if sequence in self.adapters:
                runs.append(Run(start, start + len(tokens), self.adapters[sequence]))
            start += len(tokens)
        return LoraBatch(runs) if runs else None

    def read(self, sequence: int, source: list[int]) -> None:
        """Give a sequence that is still to come a source of its own."""
        self.sources[sequence] = source

    def step(self, rows: list[tuple[int, list[int]]]) -> torch.Tensor | None:
        """Compute the tokens of each (sequence, tokens) row; the logits of all of them in order, on rank 0."""
        begun = [sequence for sequence, _ in rows if sequence not in self.lengths]
        for sequence, tokens in rows:  # a sequence that nothing else was said of comes with all of its tokens
            self.most.setdefault(sequence, len(tokens))
        if self.model.encoder is not None and begun:
            sources = [(sequence, self.sources.setdefault(sequence, SOURCE)) for sequence in begun]
            reach = [len(source) - 1 for _, source in sources for _ in source]
            self.model.encode(self._batch(sources, {}, self.memories, reach=_int32(reach)), self.kv)
        memory = recurrent = None
        if self.model.encoder is not None:
            lengths = {sequence: len(self.sources[sequence]) for sequence, _ in rows}
            reach = [lengths[sequence] - 1 for sequence, tokens in rows for _ in tokens]
            memory = MemoryRows(_int32(list(lengths.values())), _table([self.memories[s] for s in lengths]), _int32(reach))
        if self.model.spec.images is not None and self.model.spec.images.memory:  # which no token of these rows looks at
            nothing = _int32([-1 for _, tokens in rows for _ in tokens])
            memory = MemoryRows(_int32([1] * len(rows)), _table([[0]] * len(rows)), nothing)
        if self.model.slot_shapes:
            # From the top, so that a slot is never the row's number.
            slots = [self.slots.setdefault(sequence, SLOTS - 1 - len(self.slots)) for sequence, _ in rows]
            recurrent = SlotRows(_int32(slots), torch.tensor([sequence in begun for sequence, _ in rows]))
        return self.model.forward(self._batch(rows, self.lengths, self.pages, memory=memory, recurrent=recurrent), self.kv)

    def _batch(
        self, rows: list[tuple[int, list[int]]], lengths: dict[int, int], held: dict[int, list[int]], **more: object
    ) -> ForwardBatch:
        positions, slots = [], []
        for sequence, tokens in rows:
            start = lengths.get(sequence, 0)
            lengths[sequence] = start + len(tokens)
            pages = held.setdefault(sequence, [])
            while len(pages) * PAGE_TOKENS < lengths[sequence]:
                pages.append(self.free.pop())
            span = range(start, lengths[sequence])
            positions += span
            slots += [pages[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for p in span]
        counts = torch.tensor([0] + [len(tokens) for _, tokens in rows])
        return ForwardBatch(
            ids=torch.tensor([token for _, tokens in rows for token in tokens]),
            positions=_int32(positions),
            query_start=counts.cumsum(0, dtype=torch.int32),
            contexts=_int32([lengths[sequence] for sequence, _ in rows]),
            page_table=_table([held[sequence] for sequence, _ in rows]),
            slots=_int32(slots),
            wanted=torch.arange(len(slots)),
            lora=self._lora(rows),
            long=self._long(rows),
            **more,
        )

    def _long(self, rows: list[tuple[int, list[int]]]) -> torch.Tensor | None:
        after = self.model.long_after
        long = [after > 0 and self.most.get(sequence, 0) > after for sequence, tokens in rows for _ in tokens]
        return torch.tensor(long) if any(long) else None

    def greedy(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """`count` likeliest tokens after each prompt, all in one batch. Every rank needs rank 0's choice."""
        answers: list[list[int]] = [[] for _ in prompts]
        rows = list(enumerate(prompts))
        self.most = {sequence: len(prompt) + count for sequence, prompt in rows}
        for _ in range(count):
            logits = self.step(rows)
            last = torch.tensor([len(tokens) for _, tokens in rows]).cumsum(0) - 1
            chosen = torch.zeros(len(rows), dtype=torch.int64) if logits is None else logits[last].argmax(-1)
            self.group.broadcast(chosen)
            for (sequence, _), token in zip(rows, chosen.tolist(), strict=True):
                answers[sequence].append(token)
            rows = [(sequence, [answers[sequence][-1]]) for sequence, _ in rows]
        return answers


def _int32(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def _table(pages: list[list[int]]) -> torch.Tensor:
    width = max(map(len, pages))
    return _int32([held + [0] * (width - len(held)) for held in pages])


class Ranks:
    """A runner in this process as rank 0 and one in a process of its own for every further rank, doing the same."""

    def __init__(self, runner: Runner, workers: list) -> None:
        self._runner, self._workers = runner, workers

    def __getattr__(self, method: str) -> Callable:
        def everywhere(*args: object) -> object:
            for worker in self._workers:
                worker.send((method, args))
            answer = getattr(self._runner, method)(*args)
            for worker in self._workers:
                if error := worker.recv():
                    raise RuntimeError(f"another rank failed in {method}: {error}")
            return answer

        return everywhere


@contextmanager
def ranks(world: int, rendezvous: Path) -> Iterator[Ranks]:
    """A group of `world` ranks that meet at a fresh file; its processes end with the block."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(1, world):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs, rendezvous, rank, world), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        yield Ranks(Runner(Group.join(rendezvous, 0, world, timeout_s=60)), pipes)
    finally:
        for pipe in pipes:
            pipe.close()  # ends the worker's loop
        for process in processes:
            process.join(10)


def _serve(pipe, rendezvous: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    runner = Runner(Group.join(rendezvous, rank, world, timeout_s=60))
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            return
        try:
            getattr(runner, method)(*args)
        except Exception as error:
            pipe.send(repr(error))
        else:
            pipe.send(None)
