"""What the shard's tests share: tiny checkpoints, PEFT adapters for them, and engines at one and two ranks."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from pathlib import Path

import pytest
from driver import Ranks
from tiny import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """row of tiny.ROWS -> its folder, written once."""
    written: dict[str, Path] = {}

    def folder(row: str) -> Path:
        if row not in written:
            written[row] = write_checkpoint(row, tmp_path_factory.mktemp(row))
        return written[row]

    return folder


@pytest.fixture(scope="session")
def engines(checkpoint, tmp_path_factory):
    """(row, world) -> the engines of that many ranks over the row's checkpoint, made once and reserved afresh for each test."""
    made: dict[tuple[str, int], Ranks] = {}

    def ranks(row: str = "llama", world: int = 1) -> Ranks:
        if (row, world) not in made:
            made[row, world] = Ranks(checkpoint(row), world, tmp_path_factory.mktemp("rendezvous") / "file")
        made[row, world].reserve()
        return made[row, world]

    return ranks
