"""Adapters in pages: they answer from there as from anywhere, wherever they lie, and change no byte of what lies beside them.

There need be no GPU: on the one that stands in, a copy beside the steps is made only when somebody waits for it.
"""

from dataclasses import replace
from threading import local

import pytest
import side_streams
import torch
from driver import PAGES, Driver, Ranks
from elsewhere import gpus, need, settle
from hypothesis import given
from hypothesis import strategies as st
from kvrun.device import Cpu, Cuda
from kvrun.engine.sampling import Sampling
from kvrun.engine.sequence import Placement
from kvrun.errors import ProtocolError
from kvrun.lora.adapter import Adapter, Delta
from kvrun.lora.placed import Coming, Room
from kvrun.nn.build import load_model
from kvrun.rpc import convert
from kvrun.rpc.pb import model_shard_pb2 as pb
from kvrun_kernels.sgmv.table import ALIGNED
from test_captured import served  # noqa: F401
from test_device import Wire

PROMPTS = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (2, 5, 3)]
DRAWN = Sampling(temperature=0.9, seed=5, top_k=40, top_p=0.9, top_logprobs=2)


@pytest.fixture(params=("stand-in", pytest.param("cuda", marks=pytest.mark.gpu)))
def on_gpus(request, checkpoint, tmp_path):
    """(world, ...) -> the engines of that many ranks over the tiny Llama, each on a GPU, or on one that is not there."""
    need(request.param)
    threads = local()

    def load(folder, *, group, **more):
        if request.param != "cuda" and not hasattr(threads, "device"):  # the threads are the engines' own and end with them
            threads.device = settle()
            group._device = group._host and Wire(group._host)
        return load_model(folder, device=Cuda(group.rank), group=group, **more)

    def made(world=1, **more):
        if request.param == "cuda" and world > 1:
            pytest.skip("several ranks on GPUs: one GPU here")
        ranks = Ranks(checkpoint("llama"), world, tmp_path / "rendezvous", load_model=load, **more)
        ranks.reserve(adapter_bytes=1 << 24)
        return ranks

    if request.param == "cuda":
        yield made
        return
    with gpus(2):
        side_streams.MADE.clear()
        yield made


def answers(ranks, names, adapter) -> dict:
    """Answers of one request for each adapter and one for the base model, all in one batch."""
    for handle, name in enumerate(names, start=1):
        ranks.load(handle, adapter(name))
    driver = Driver(ranks.step)
    for handle in range(len(names) + 1):
        driver.add(handle, PROMPTS[handle % 3], 2, DRAWN if handle % 2 else None, adapter=handle)
    driver.run(chunk=3)
    assert not driver.errors
    return driver.answers


@pytest.mark.parametrize(("world", "names"), [(1, ["rank1", "rank3", "rank64", "patterns"]), (2, ["rank1", "rank64"])])
def test_adapters_of_every_rank_answer_from_pages_as_from_the_host(world, names, on_gpus, engines, adapter):
    expected = answers(engines(), names, adapter)
    ranks = on_gpus(world)
    assert answers(ranks, names, adapter) == expected
    for engine in ranks.engines:
        held = [engine.adapters.get(handle) for handle in range(1, len(names) + 1)]
        pool = [layer.untyped_storage() for layer in engine._pool.kv.layers]
        ends = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in pool]
        for matrix in (matrix for adapter in held for matrix in adapter.matrices()):
            assert any(begin <= matrix.data_ptr() < end for begin, end in ends), "it lies in no page"


@pytest.mark.parametrize("captured", [(), (2,)], ids=("as they come", "captured"))
def test_an_adapter_that_comes_again_elsewhere_is_the_same(captured, on_gpus, engines, adapter):
    def run(ranks, moves) -> dict:
        for handle, name in enumerate(("rank8", "rank64"), start=1):
            ranks.load(handle, adapter(name))
        driver = Driver(ranks.step)
        driver.add(0, PROMPTS[1], 8)  # its pages are in use all the while
        for index, (handle, place) in enumerate(moves, start=1):
            if place is not None:
                driver.move(handle, place)
            driver.add(index, PROMPTS[2], 2, adapter=handle)
            while index in driver.running:
                driver.turn(chunk=16)
            if place is not None:
                driver.move(handle)
        driver.run()
        return driver.answers

    places = [(1, PAGES), (2, PAGES + 3), (1, PAGES + 200), (2, PAGES)]
    expected = run(engines(), [(handle, None) for handle, _ in places])
    assert run(on_gpus(captured=captured), places) == expected
    assert expected[1] == expected[3] != expected[2] == expected[4]


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "fp8_e5m2", "int8"])
def test_no_byte_of_another_page_changes(kv_dtype, on_gpus, adapter):
    ranks = on_gpus(kv_dtype=kv_dtype)
    loaded, (engine,) = ranks.load(1, adapter("patterns")), ranks.engines
    first, pages = PAGES + 7, loaded.pages

    @torch.inference_mode()
    def place() -> None:
        layers = [layer.view(torch.uint8) for layer in engine._pool.kv.layers]
        for layer in layers:
            layer.fill_(0xA5)
        engine.adapters.move([], [(1, first)], set())
        engine.adapters.settle()
        for layer in layers:
            held = layer.cpu()
            assert (held[:first] == 0xA5).all() and (held[first + pages :] == 0xA5).all()
        placed = engine.adapters.get(1)
        assert len(loaded.matrices()) == len(placed.matrices()) == 28
        for ours, theirs in zip(loaded.matrices(), placed.matrices(), strict=True):
            assert torch.equal(ours, theirs.cpu())

    ranks.each(lambda engine: place())


@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3fn", "int8"])
def test_adapters_answer_from_pages_of_8_bits(kv_dtype, on_gpus, checkpoint, adapter):
    on_host = Ranks(checkpoint("llama"), kv_dtype=kv_dtype)
    on_host.reserve()
    assert answers(on_gpus(kv_dtype=kv_dtype), ["rank3", "rank64"], adapter) == answers(on_host, ["rank3", "rank64"], adapter)


@pytest.mark.parametrize("on_gpus", ["stand-in"], indirect=True)
def test_the_first_layer_runs_before_the_last_one_has_come(on_gpus, adapter):
    ranks = on_gpus()
    ranks.load(1, adapter("rank64"))
    driver = Driver(ranks.step)
    driver.add(0, PROMPTS[1], 3, adapter=1)
    driver.turn()
    assert side_streams.MADE == [1, 2], "one wait for each layer's pages"
    driver.run()
    assert side_streams.MADE == [1, 2], "a placement is over with its step"


@pytest.mark.parametrize("on_gpus", ["stand-in"], indirect=True)
def test_an_adapter_that_is_not_waited_for_is_seen(on_gpus, engines, adapter, monkeypatch):
    expected = answers(engines(), ["rank64"], adapter)
    monkeypatch.setattr(Coming, "wait", lambda self, site: None)
    assert answers(on_gpus(), ["rank64"], adapter) != expected


@pytest.mark.parametrize("on_gpus", ["stand-in"], indirect=True)
def test_a_captured_step_waits_for_all_of_an_adapter(on_gpus, engines, adapter, served):  # noqa: F811
    def run(ranks, first=None) -> dict:
        ranks.load(1, adapter("rank64"))
        driver = Driver(ranks.step)
        driver.add(0, PROMPTS[0][:1], 4, adapter=1)  # a prompt of one token is a step of decoding
        if first is not None:
            driver.move(1, first)
        return driver.run()

    assert run(on_gpus(captured=(1,)), PAGES) == run(engines())
    assert served[0] == (1, True, True)


def test_what_breaks_a_rule_is_refused_by_name(on_gpus, adapter):
    ranks = on_gpus()
    pages = ranks.load(1, adapter("rank8")).pages
    total = ranks.engines[0]._pool.kv.pages

    def move(displaced=(), placed=(), in_use=()) -> None:
        ranks.each(torch.inference_mode()(lambda engine: engine.adapters.move(displaced, placed, in_use)))

    def refused(why, *moves, **more) -> None:
        with pytest.raises(ProtocolError, match=why):
            move(*moves, **more)

    with pytest.raises(ProtocolError, match="handle 1 lies in no pages; place it first"):
        ranks.each(lambda engine: engine.adapters.get(1))
    refused("handle 1 is displaced and lies in no pages", displaced=[1])
    refused("handle 2 cannot be placed: no adapter that wants pages is loaded under it", placed=[(2, 0)])
    refused(f"handle 1 cannot be placed: it wants {pages} pages from {total - pages + 1} on", placed=[(1, total - pages + 1)])
    move(placed=[(1, total - pages)])
    refused("handle 1 cannot be placed: it lies in pages already", placed=[(1, 0)])
    refused("handle 1 is displaced while admitted sequences use it", displaced=[1], in_use={1})
    ranks.each(lambda engine: engine.adapters.unload(1))
    move(displaced=[1])


def test_the_wire_says_who_leaves_pages_and_who_comes_into_which():
    step = convert.to_step(pb.Step(number=1, displace=[3], place=[pb.Placement(adapter=4, first=70)]))
    assert (list(step.displace), step.place) == ([3], [Placement(4, 70)])


def test_a_host_s_adapters_want_no_pages(engines, adapter):
    assert engines().load(1, adapter("rank8")).pages == 0


SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)


@given(SHAPES, st.lists(st.integers(1, 70), min_size=1, max_size=4), st.integers(0, 5), st.booleans())
def test_every_matrix_lies_whole_on_a_line_in_the_fewest_pages(shapes, widths, first, shared):
    pairs = [
        (torch.full((rank, inputs), site + 0.25), torch.full((rank, outputs), site + 0.5))
        for site, (rank, inputs, outputs) in enumerate(shapes)
    ]
    deltas = {site: (Delta(a, bt, 0),) for site, (a, bt) in enumerate(pairs)}
    if shared:
        deltas[len(pairs)] = deltas[0]
    host = replace(Adapter("", {}, {}, 0, 0, (), ()), deltas=deltas)
    layers = [torch.zeros(1, width, dtype=torch.uint8) for width in widths]
    packed = Room(layers, 1).pack(host, Cpu())
    pages = packed.adapter.pages
    layers = [torch.zeros(first + pages, width, dtype=torch.uint8) for width in widths]
    room = Room(layers, first + pages)
    placed = room.place(packed, first, Cpu())
    assert all(torch.equal(a, b) for a, b in zip(host.matrices(), placed.matrices(), strict=True))
    for matrix in placed.matrices():
        (layer,) = [layer for layer in layers if layer.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()]
        assert (matrix.data_ptr() - layer.data_ptr()) % ALIGNED == 0
    assert all(not layer[:first].any() for layer in layers), "pages before its own"
    assert pages == 1 or room._spots([-(-matrix.nbytes // ALIGNED) * ALIGNED for matrix in host.matrices()], pages - 1) is None
