#!/usr/bin/env python3
"""Measure this machine, kv.run and the peers there are, taking turns in one run, and write a page of tables.

    bench.py                                     what `make bench` runs
    bench.py decode prefill --turns 5            these scenarios
    bench.py --llama-cpp ~/llama.cpp --vllm ~/vllm/bin/vllm

Peers are optional. llama.cpp is a folder of its sources, built with cmake into its build/; vLLM is its program; either is also
found on PATH. Of all servers that are up, only the one that is measured runs; the others are stopped where they are. Models are
made with random weights at first use. Results go to build/bench/, a file for each scenario, and the page is made of all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
from pathlib import Path

from machine import Limits, cores, describe
from make_model import SHAPES, write_adapter, write_model
from peers import Model, Unavailable, find
from peers.process import Pool
from report import Line, Result, page, section
from scenarios import Row, Scenario, every

ROOT = Path(__file__).resolve().parents[1]
WINDOW, RANKS = 32_768, (8, 16, 24, 32, 40, 48, 56, 64)


def make(folder: Path, shape: str) -> Model:
    """The model in this folder, written with its adapters if it is not there."""
    if not (folder / "tokenizer.json").exists():
        print(f"writing {folder}", file=sys.stderr)
        write_model(folder, SHAPES[shape], 32_000, WINDOW, 0)
    for i, rank in enumerate(RANKS):
        adapter = folder / "adapters" / f"lora{i}-r{rank}"
        if not (adapter / "adapter_config.json").exists():
            write_adapter(adapter, SHAPES[shape], rank, i + 1)
    return Model(folder)


def state() -> str:
    """The commit, with `-dirty` where files differ from it."""
    said = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=7"], cwd=ROOT, capture_output=True, text=True)
    return said.stdout.strip() or "unknown"


def measure(result: Result, scenario: Scenario, rows: list[Row], pool: Pool, limits: Limits | None, turns: int) -> None:
    """Add to a result: all rows in turn, as often as asked, and the machine's limits between them."""
    lines = {(line.server, line.case): line for line in result.lines}
    lost: set[tuple[str, str]] = set()
    for turn in range(scenario.turns or turns):
        if limits:
            for name, rate in limits.products().items():
                result.limits.setdefault(name, []).append(rate)
        for row in rows[turn % len(rows) :] + rows[: turn % len(rows)]:
            key = (row.server, row.case)
            if key in lost:
                continue
            if limits:  # before every row: what neighbours leave of the memory's rate changes within seconds
                result.limits.setdefault("read", []).append(limits.read())
            try:
                figures = row.measure(pool, turn)
            except (Unavailable, RuntimeError) as why:
                lost.add(key)
                result.missing.append(f"{row.server}, {row.case}: {why}")
                print(f"{row.server}, {row.case}: {why}", file=sys.stderr)
                continue
            if key not in lines:
                lines[key] = Line(row.server, row.peer.name, row.case, row.step_bytes and row.step_bytes(), row.token_flops)
            lines[key].add(figures)
            said = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
            print(f"{scenario.name}, turn {turn + 1}: {row.server}, {row.case}: {said}", file=sys.stderr, flush=True)
    order = {(row.server, row.case): i for i, row in enumerate(rows)}
    result.lines = sorted(lines.values(), key=lambda line: order.get((line.server, line.case), len(order)))


def parse(scenarios: list[Scenario]) -> argparse.Namespace:
    names = {scenario.name: scenario for scenario in scenarios}

    def named(name: str) -> Scenario:
        if name not in names:
            raise argparse.ArgumentTypeError(f"there is no scenario {name}; choose of {', '.join(names)}")
        return names[name]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", type=named, metavar="scenario", help=f"of {', '.join(names)}; else the usual ones")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--turns", type=int, default=3, help="how often every row is measured")
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "bench" / "models", help="where models are made and kept")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="where results are kept")
    parser.add_argument("--add", action="store_true", help="add turns to results that are there, instead of replacing them")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's sources")
    parser.add_argument("--vllm", type=Path, help="vLLM's program")
    parser.add_argument("--only", default="", help="measure these servers alone, comma between their names")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--no-limits", action="store_true", help="do not measure the machine itself")
    return parser.parse_args()


def main() -> None:
    scenarios = every()
    args = parse(scenarios)
    chosen = args.scenarios or [s for s in scenarios if s.usual]
    args.out.mkdir(parents=True, exist_ok=True)
    model = make(args.models / args.shape, args.shape)
    only = args.only.split(",") if args.only else None
    peers = [p for p in find(ROOT, args.llama_cpp, args.vllm, args.threads) if only is None or p.name in only]
    limits = None if args.no_limits else Limits(args.threads)
    with contextlib.closing(Pool(args.out)) as pool:
        signal.signal(signal.SIGTERM, lambda *_: (pool.kill(), sys.exit(143)))  # answers under way end with their servers
        for place, scenario in enumerate(chosen):
            file = args.out / f"{scenario.name}.json"
            fresh = not (args.add and file.exists())
            result = Result(scenario.name, args.shape, describe(), state()) if fresh else Result.load(file)
            result.state = ", ".join(dict.fromkeys([*result.state.split(", "), state()]))
            measure(result, scenario, scenario.rows(model, peers), pool, limits, args.turns)
            result.save(args.out)
            print(section(scenario, result), flush=True)
            later = [row for s in chosen[place + 1 :] for row in s.rows(model, peers)]
            pool.keep({(row.peer.name, row.setup) for row in later})
    (args.out.parent / "bench.md").write_text(page(scenarios, args.out))


if __name__ == "__main__":
    main()
