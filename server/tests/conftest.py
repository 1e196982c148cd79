"""What the shard's tests share: tiny checkpoints, PEFT adapters for them, and engines at one and two ranks."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from adapters import ADAPTERS, write_adapter
from driver import Ranks
from elsewhere import computing, gpus, need
from kvrun.device import Cuda
from kvrun.nn.loaded import LoadedModel
from ragged import WORLDS, ranks
from tiny import write_checkpoint

# Read when Triton is imported, so it is settled here, before any test: compiled where there is a GPU, else interpreted for one that is not.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tiny tensors gain nothing from more threads, and lose much when the machine is busy.
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: on a CUDA device")


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
def groups(tmp_path_factory):
    """world -> the runners of that many ranks; the further ranks are processes of their own."""
    at = tmp_path_factory.mktemp("rendezvous")
    with ExitStack() as stack:
        yield {world: stack.enter_context(ranks(world, at / str(world))) for world in WORLDS}


@pytest.fixture(scope="session")
def adapter(checkpoint, tmp_path_factory):
    """name in ADAPTERS -> its folder, written once."""
    written: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in written:
            row, config = ADAPTERS[name]
            seed = sorted(ADAPTERS).index(name)
            written[name] = write_adapter(tmp_path_factory.mktemp("adapters") / name, checkpoint(row), seed, **config)
        return written[name]

    return folder


@pytest.fixture(params=("stand-in", pytest.param("cuda", marks=pytest.mark.gpu)))
def gpu(request):
    """One GPU, or one that is not there, for this thread."""
    need(request.param)
    if request.param == "cuda":
        yield Cuda(0)
        return
    with gpus(), computing():
        yield Cuda(0)


@pytest.fixture(scope="session")
def engines(checkpoint, tmp_path_factory):
    """(row, world) -> the engines of that many ranks over the row's checkpoint, made once and reserved afresh for each test."""
    made: dict[tuple[str, int], Ranks] = {}

    def reserved(row: str = "llama", world: int = 1) -> Ranks:
        if (row, world) not in made:
            made[row, world] = Ranks(checkpoint(row), world, tmp_path_factory.mktemp("rendezvous") / "file")
        made[row, world].reserve()
        return made[row, world]

    return reserved


@pytest.fixture
def heard(monkeypatch):
    """The logits of every forward pass, as rank 0 has them."""
    passes: list[torch.Tensor] = []
    forward = LoadedModel.forward

    def listen(self, batch, *rest):
        logits = forward(self, batch, *rest)
        if logits is not None:
            passes.append(logits)
        return logits

    monkeypatch.setattr(LoadedModel, "forward", listen)
    return passes
