"""Runs a loaded model over sequences in any mixture of chunks, and the same in a group of real processes."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from kvrun.dist import Group
from kvrun.nn.batch import ForwardBatch
from kvrun.nn.build import load_model

PAGE_TOKENS, PAGES = 4, 512


class Runner:
    """One rank: a model, its pool, and the pages and length of every sequence."""

    def __init__(self, group: Group | None = None) -> None:
        self.group = group or Group.single()

    def load(self, folder: Path, dtype: str = "float32") -> None:
        """Load a model and forget every sequence."""
        self.model = load_model(folder, dtype=dtype, group=self.group)
        self.kv = self.model.pool(PAGES, PAGE_TOKENS)
        # Scattered pages: a kernel that took a sequence's pages to be adjacent would be seen.
        self.free = torch.randperm(PAGES, generator=torch.Generator().manual_seed(0)).tolist()
        self.pages: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def step(self, rows: list[tuple[int, list[int]]]) -> torch.Tensor | None:
        """Compute the tokens of each (sequence, tokens) row; the logits of all of them in order, on rank 0."""
        positions, slots = [], []
        for sequence, tokens in rows:
            start = self.lengths.get(sequence, 0)
            self.lengths[sequence] = start + len(tokens)
            pages = self.pages.setdefault(sequence, [])
            while len(pages) * PAGE_TOKENS < self.lengths[sequence]:
                pages.append(self.free.pop())
            span = range(start, self.lengths[sequence])
            positions += span
            slots += [pages[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for p in span]
        tables = [self.pages[sequence] for sequence, _ in rows]
        width = max(map(len, tables))
        counts = torch.tensor([0] + [len(tokens) for _, tokens in rows])
        return self.model.forward(
            ForwardBatch(
                ids=torch.tensor([token for _, tokens in rows for token in tokens]),
                positions=torch.tensor(positions, dtype=torch.int32),
                query_start=counts.cumsum(0, dtype=torch.int32),
                contexts=torch.tensor([self.lengths[sequence] for sequence, _ in rows], dtype=torch.int32),
                page_table=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
                slots=torch.tensor(slots, dtype=torch.int32),
                wanted=torch.arange(len(slots)),
                lora=None,
            ),
            self.kv,
        )

    def greedy(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """`count` likeliest tokens after each prompt, all in one batch. Every rank needs rank 0's choice."""
        answers: list[list[int]] = [[] for _ in prompts]
        rows = list(enumerate(prompts))
        for _ in range(count):
            logits = self.step(rows)
            last = torch.tensor([len(tokens) for _, tokens in rows]).cumsum(0) - 1
            chosen = torch.zeros(len(rows), dtype=torch.int64) if logits is None else logits[last].argmax(-1)
            self.group.broadcast(chosen)
            for (sequence, _), token in zip(rows, chosen.tolist(), strict=True):
                answers[sequence].append(token)
            rows = [(sequence, [answers[sequence][-1]]) for sequence, _ in rows]
        return answers


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
