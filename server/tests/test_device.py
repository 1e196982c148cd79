"""Where a shard computes: what a GPU decides, and that every architecture runs on one without a tensor left on the host.

There need be no GPU: `elsewhere.py` stands in for one, and Triton's interpreter for its processors. Where there is one,
`pytest -m gpu` runs the same tests on it.
"""

from dataclasses import dataclass
from functools import partial
from subprocess import CompletedProcess, TimeoutExpired
from threading import local

import gpu_check
import graphs
import kvrun_kernels
import pytest
import shapes
import torch
from driver import Driver, Ranks
from elsewhere import GIB, LAUNCHES, Mixed, gpus, interpreting, need, settle
from kvrun.device import Cpu, Cuda, choose, refuse_unless, serving
from kvrun.dist import Group
from kvrun.engine.engine import Engine
from kvrun.engine.sampling import Sampling
from kvrun.errors import DeviceError, Unsupported
from kvrun.nn.build import load_model
from kvrun_kernels import ops
from make_model import SHAPES, write_adapter, write_model
from ragged import Runner
from test_parity import prompts
from tiny import CLOSE, ROWS, distance, oracle

PROMPTS = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (2, 9, 30)]
WIDEST = torch.finfo(torch.float32).max
ASKED = prompts(lengths=(1, 2, 7, 19))


@dataclass(frozen=True)
class Pair:
    one: torch.Tensor
    none: torch.Tensor | None


@dataclass(frozen=True)
class Step:
    ids: torch.Tensor
    flags: torch.Tensor
    pair: Pair | None
    count: int = 3


@pytest.mark.parametrize(("asked", "count", "rank", "found"), [
    ("auto", 0, 0, Cpu()), ("auto", 0, 3, Cpu()), ("cpu", 4, 1, Cpu()), ("auto", 2, 1, Cuda(1, 0.5)), ("cuda", 1, 0, Cuda(0, 0.5)),
])  # fmt: skip
def test_a_rank_computes_on_the_gpu_of_its_number_where_there_is_one(asked, count, rank, found):
    with gpus(count):
        assert choose(asked, rank, 0.5) == found


@pytest.mark.parametrize(("asked", "count", "rank", "why"), [
    ("cuda", 0, 0, "sees no GPU that PyTorch can use"), ("auto", 2, 2, "sees 2, numbered from 0"), ("cuda", 1, 5, "sees 1,"),
])  # fmt: skip
def test_a_rank_without_a_gpu_of_its_own_is_refused(asked, count, rank, why):
    with gpus(count), pytest.raises(DeviceError, match=rf"rank {rank} was to compute on cuda:{rank}, and .* {why}.*--num-shard") as error:
        choose(asked, rank)
    assert error.value.exit_code == 14


@pytest.mark.parametrize(("stored", "capability", "magnitude", "suited"), [
    (torch.float32, (8, 0), 0, torch.bfloat16), (torch.bfloat16, (9, 0), 0, torch.bfloat16), (torch.float16, (9, 0), 0, torch.float16),
    (torch.bfloat16, (7, 5), 0, torch.float16), (torch.float32, (7, 5), 1e4, torch.float16), (torch.bfloat16, (7, 5), 1e5, torch.float32),
])  # fmt: skip
def test_what_nobody_said_is_computed_in_16_bits_that_the_gpu_multiplies(stored, capability, magnitude, suited):
    with gpus(capability=capability):
        assert Cuda(0).suited(stored, magnitude) == suited
    assert Cpu().suited(stored, magnitude) == stored


def test_free_memory_is_what_is_left_of_the_share():
    with gpus(free=20 * GIB, total=24 * GIB):
        assert [Cuda(0, fraction).free_bytes() for fraction in (1.0, 0.5)] == [20 * GIB, 12 * GIB]


def test_a_batch_is_carried_in_one_copy(gpu, monkeypatch):
    staged = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: staged.append(how) or empty(*size, **how))
    there = torch.arange(3).to(gpu.place)
    made = Step(torch.arange(7), torch.tensor([True, False, True]), Pair(there, None))
    taken = gpu.take(made)
    assert staged == [{"dtype": torch.uint8, "pin_memory": True}]
    assert taken.pair.one is there and taken.pair.none is None and taken.count == 3
    for name in ("ids", "flags"):
        was, now = getattr(made, name), getattr(taken, name)
        assert now.device == gpu.place and now.dtype == was.dtype and now.tolist() == was.tolist()
    assert Cpu().take(made) is made


def test_every_op_has_a_kernel_on_a_gpu():
    assert "reference" not in serving(Cuda(0), strict=True).values()


def test_strict_kernels_name_the_ops_that_plain_pytorch_would_serve():
    kvrun_kernels.use("reference")
    try:
        for device in (Cpu(), Cuda(1)):
            with pytest.raises(DeviceError, match=rf"--strict-kernels: on {device.place}, .*rope.* would be left to plain PyTorch"):
                serving(device, strict=True)
    finally:
        kvrun_kernels.use("native")


def test_what_only_cpus_do_is_refused_on_a_gpu_by_its_flag():
    refuse_unless("cpu", Cpu(), {"--packed-cache": True})
    refuse_unless("cpu", Cuda(0), {"--packed-cache": False})
    with pytest.raises(Unsupported, match=r"^--packed-cache was asked for on cuda:0"):
        refuse_unless("cpu", Cuda(0), {"--packed-cache": True})


def test_what_only_gpus_do_is_refused_on_cpus_by_its_flag():
    refuse_unless("cuda", Cuda(0), {"--cuda-graphs": True})
    refuse_unless("cuda", Cpu(), {"--cuda-graphs": False})
    with pytest.raises(Unsupported, match=r"^--cuda-graphs was asked for on cpu, and only GPUs do that"):
        refuse_unless("cuda", Cpu(), {"--cuda-graphs": True})


@pytest.mark.parametrize("gpu", ["stand-in"], indirect=True)
def test_the_stand_in_stops_what_a_gpu_would_stop(gpu):
    there = torch.ones(2, 3, device=gpu.place)
    with pytest.raises(Mixed, match=r"aten\.add"):
        there + torch.ones(2, 3)
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    heads, angles = torch.ones(1, 2, 8, device=gpu.place), torch.ones(4, 4, device=gpu.place)
    with pytest.raises(Mixed, match="_rotate was given the host's tensors"):
        ops.rope_(heads, heads, torch.zeros(1, dtype=torch.int32), angles, angles)


@pytest.fixture
def truth(row, checkpoint):
    """transformers' logits for ASKED, computed on the host: ask for it before `gpu`."""
    return torch.cat(oracle(checkpoint(row), ASKED))


@pytest.mark.parametrize("row", ROWS)
def test_logits_on_a_gpu_equal_transformers(row, truth, gpu, checkpoint):
    runner = Runner()
    runner.load(checkpoint(row), device=gpu)
    logits = runner.step(list(enumerate(ASKED)))
    assert logits.device == gpu.place and (LAUNCHES or not interpreting())
    assert distance(logits.cpu(), truth) < CLOSE


@pytest.fixture(params=("stand-in", pytest.param("cuda", marks=pytest.mark.gpu)))
def on_gpus(request, checkpoint, tmp_path):
    """(row, world) -> the engines of that many ranks, each on a GPU, or on one that is not there."""
    need(request.param)
    if request.param == "cuda":
        yield lambda row: Ranks(checkpoint(row), load_model=partial(load_model, device=Cuda(0)))
        return
    threads = local()

    def load(folder, *, group, **more):
        if not hasattr(threads, "device"):  # the threads are the engines' own and end with them
            threads.device = settle()
        group._device = group._host and Wire(group._host)
        return load_model(folder, device=Cuda(group.rank), group=group, **more)

    with gpus(2):
        yield lambda row, world=1: Ranks(checkpoint(row), world, tmp_path / "rendezvous", load_model=load)


class Wire:
    """Collectives between GPUs that are not there, over the host's."""

    def __init__(self, host):
        self._host, self.calls = host, []

    def _call(self, name, *given):
        held = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.held, given)
        self.calls.append(name)
        run = getattr(self._host, name)
        if (graph := graphs.active()) is not None:
            graph.note(lambda *again: run(*again).wait(), held, {}, {id(tensor) for tensor in torch.utils._pytree.tree_leaves(held)})
        return run(*held)

    def allreduce(self, tensors):
        return self._call("allreduce", tensors)

    def gather(self, *given):
        return self._call("gather", *given)

    def broadcast(self, *given):
        return self._call("broadcast", *given)


WAYS = {
    "greedy": Sampling(top_logprobs=2, prompt_logprobs=True),
    "drawn": Sampling(temperature=0.9, seed=5, top_k=40, top_p=0.9, min_p=0.01, typical_p=0.95),
    "wide": Sampling(temperature=1.3, seed=6, top_p=0.999),
    "adjusted": Sampling(repetition_penalty=1.2, frequency_penalty=0.3, logit_bias={7: 4.0}, suppressed=(2,), suppressed_until=4),
}


def answers(ranks, way: Sampling, adapter=None) -> Driver:
    ranks.reserve(adapter_bytes=1 << 24)
    if adapter is not None:
        ranks.load(3, adapter)
    driver = Driver(ranks.step)
    for index, prompt in enumerate(PROMPTS):
        driver.add(index, prompt, 6, way, adapter=3 * (index % 2) if adapter is not None else 0)
    driver.run(chunk=16)
    return driver


@pytest.mark.parametrize("way", WAYS)
def test_an_engine_on_a_gpu_answers_as_one_on_the_host(way, engines, on_gpus):
    expected = answers(engines("llama"), WAYS[way])
    ranks = on_gpus("llama")
    found = answers(ranks, WAYS[way])
    assert [engine.describe()["device"] for engine in (*engines("llama").engines, *ranks.engines)] == ["cpu", "cuda:0"]
    assert found.answers == expected.answers and not found.errors
    assert "_attend" in LAUNCHES or not interpreting()
    for index in expected.prompts:
        for ours, theirs in zip(found.prompts[index], expected.prompts[index], strict=True):
            assert ours.id == theirs.id and ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


@pytest.mark.parametrize("name", ["rank64", "patterns"])
def test_adapters_lie_and_answer_on_a_gpu(name, engines, on_gpus, adapter):
    expected = answers(engines("llama"), WAYS["greedy"], adapter(name))
    ranks = on_gpus("llama")
    assert answers(ranks, WAYS["greedy"], adapter(name)).answers == expected.answers
    held = ranks.engines[0].adapters.get(3)
    assert all(t.device == Cuda(0).place for deltas in held.deltas.values() for delta in deltas for t in (delta.a, delta.bt))
    assert held.bytes == engines("llama").load(3, adapter(name)).bytes
    assert {"_shrink", "_expand"} <= set(LAUNCHES) or not interpreting()


@pytest.mark.parametrize("on_gpus", ["stand-in"], indirect=True)
def test_ranks_on_gpus_add_up_by_their_own_collectives(engines, on_gpus):
    expected, ranks = answers(engines("llama"), WAYS["greedy"]), on_gpus("llama", 2)
    assert answers(ranks, WAYS["greedy"]).answers == expected.answers
    assert {"allreduce", "gather", "broadcast"} <= set(ranks.engines[0]._group._device.calls)


def test_a_group_of_one_needs_no_collectives_on_a_gpu(gpu):
    x = torch.ones(2, 3, device=gpu.place)
    assert Group.single().all_reduce(x) is x


def test_the_shard_says_where_it_computes_and_by_what(on_gpus):
    said = on_gpus("llama").engines[0].describe()
    assert said["device"] == "cuda:0" and said["kernels"]["paged_attention"] == "triton" and said["kernels"]["linear"] == "torch"


def test_the_check_of_a_gpu_runs_every_stage_or_nothing(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr("subprocess.run", lambda words, **how: ran.append(words[1:]) or CompletedProcess(words, int("bench" in words[2])))
    with gpus(0):
        assert gpu_check.main() == 14 and not ran
    assert "sees no GPU" in capsys.readouterr().err
    monkeypatch.setattr(gpu_check, "missing", lambda capability: "")
    with gpus(1):
        assert gpu_check.main() == 1
    assert ran == [list(arguments) for arguments in gpu_check.STAGES.values()]
    table = capsys.readouterr().out.strip().splitlines()
    assert table[0] == "| on cuda:0, a GPU that is not there, compute capability 9.0, 20.0 GiB free | | |"
    assert [line.split(" | ")[1] for line in table[2:]] == [*["passed"] * 4, "failed (1)", *["passed"] * 2]
    monkeypatch.setattr("subprocess.run", _hanging)
    with gpus(1):
        assert gpu_check.main() == 1
    assert capsys.readouterr().out.count("| failed (TimeoutExpired) |") == len(gpu_check.STAGES)
    monkeypatch.setattr("subprocess.run", lambda words, **how: ran.append(words[1:]) or CompletedProcess(words, int("bench" in words[2])))
    monkeypatch.setattr(gpu_check, "missing", lambda capability: "it is not installed")
    ran.clear()
    with gpus(1):
        assert gpu_check.main() == 1
    assert list(gpu_check.STAGES[gpu_check.ATTENTION]) not in ran and len(ran) == len(gpu_check.STAGES) - 1
    assert f"| {gpu_check.ATTENTION} | not run | it is not installed |" in capsys.readouterr().out


def test_shapes_are_measured_on_a_gpu_with_graphs_and_without(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "PROMPT", 8)
    monkeypatch.setattr(shapes, "WARM", 1)
    monkeypatch.setattr(Engine, "warm", lambda engine: None)
    write_model(tmp_path, SHAPES["tiny"], vocabulary=14_000, context=64, seed=0)
    for n in range(2):
        write_adapter(tmp_path / "adapters" / str(n), SHAPES["tiny"], rank=3, seed=n)
    lines = list(shapes.ours(tmp_path, "cuda", streams=3, steps=2, bound=shapes.Limits(1e9, 1e9)))
    asked = ["one stream", "3 streams", "3 streams over 2 adapters"]
    asked = [f"kv.run, {what}{how}" for how in ("", ", without graphs") for what in asked]
    assert [line.what for line in lines] == [*asked, "kv.run, prompt of 8"] and all(line.tokens_per_s > 0 for line in lines)


def _hanging(words, *, timeout, **how):
    raise TimeoutExpired(words, timeout)
