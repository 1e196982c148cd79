"""Attention by FlashInfer: what it is asked, that its answers are those of our own ops, and what it is not asked.

There need be no GPU: `flashinfer_stand_in.py` computes what the package documents, on the stand-in for a GPU. Where there is one
and the package is installed, `pytest -m gpu` asks the package.
"""

import inspect
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import flashinfer_stand_in as stand_in
import pytest
import torch
from ahead import Ahead, Launches
from driver import PAGE_TOKENS, PAGES, SEQUENCES, STEP_TOKENS, Driver
from elsewhere import gpus, interpreting
from kvrun.attention import flashinfer
from kvrun.attention.backend import HostRows, Kind, Scores
from kvrun.attention.choice import choose_attention
from kvrun.attention.native import Native
from kvrun.dist import Group
from kvrun.engine.engine import Engine
from kvrun.engine.memory import MemoryBudget
from kvrun.errors import DeviceError
from kvrun.nn.batch import ForwardBatch
from kvrun.nn.build import load_model
from kvrun.nn.positions import alibi_slopes
from kvrun.state.pages import KvPages, stored_name
from kvrun.state.shapes import PageShape, PageUse
from kvrun_kernels import ops
from kvrun_kernels.capture import Captures
from kvrun_kernels.paged_attention.op import reference
from ragged import Runner
from test_parity import prompts
from tiny import CLOSE, distance, oracle

SIXTEEN = {torch.bfloat16: 2**-6, torch.float16: 2**-9}  # how far answers of magnitude 1 may lie apart
MIXED = ((5, 5), (1, 40), (3, 37), (1, 1), (20, 32))  # tokens of each row, of its sequence
SINGLE = ((1, 40), (1, 17), (1, 1), (1, 16))
PREFILL, DECODE, SINK = (
    f"Batch{name}Wrapper" for name in ("PrefillWithPagedKVCache", "DecodeWithPagedKVCache", "AttentionWithAttentionSink")
)


@pytest.fixture
def package(gpu, monkeypatch):
    """What `flashinfer.library` gives: the package on a GPU, its stand-in on the GPU's."""
    if not interpreting():
        if why := flashinfer.missing(gpu.capability):
            pytest.skip(why)
        return flashinfer.library()
    monkeypatch.setattr(flashinfer, "missing", lambda capability: "")
    monkeypatch.setattr(flashinfer, "library", lambda: stand_in)
    monkeypatch.setattr(flashinfer, "WORKSPACE_BYTES", 1 << 10)
    stand_in.CALLS.clear()
    return stand_in


@pytest.fixture
def wide(package, monkeypatch):
    """Has the stand-in serve what tiny models are made of: float32, and heads of any size."""
    if package is not stand_in:
        pytest.skip("models in float32 with heads of 16: FlashInfer has no kernels for them")
    for module in (flashinfer, stand_in):
        monkeypatch.setattr(module, "DTYPES", {torch.float32})
        monkeypatch.setattr(module, "HEAD_DIMS", range(8, 65))


def ran(*methods):
    """The wrappers of which one of these methods was called, in order."""
    return [name for name, method, *_ in stand_in.CALLS if method in methods]


class Case:
    """Rows whose keys lie in scattered pages of a pool, where what belongs to nobody is NaN; the last keys of each are new."""

    def __init__(self, rows, dtype, heads=4, kv_heads=2, dim=64, page_tokens=16, stored=None, **scores):
        torch.manual_seed(0)
        stored = stored or dtype
        self.rows, self.scores = rows, Scores(**{"scale": dim**-0.5, **scores})
        counts = [-(-context // page_tokens) for _, context in rows]
        pages = torch.randperm(sum(counts) + 2).int().split([*counts, 2])[:-1]
        table = torch.nn.utils.rnn.pad_sequence(list(pages), batch_first=True, padding_value=-1)
        lengths = torch.tensor([0, *(count for count, _ in rows)], dtype=torch.int32)
        self.host = HostRows(
            lengths.cumsum(0, dtype=torch.int32).numpy(), torch.tensor([c for _, c in rows], dtype=torch.int32).numpy(), table.numpy()
        )
        self.kv = KvPages([PageShape(kv_heads, dim)], sum(counts) + 2, page_tokens, stored)
        pool = self.kv.layers[0]
        pool.view(torch.uint8).fill_(0xFF if stored != torch.float8_e5m2 else 0x7F)
        places, self.new = [], []
        for held, (count, context) in zip(pages, rows):
            pool[held.long()] = 0
            at = torch.arange(context)
            slots = (held.long()[at // page_tokens] * page_tokens + at % page_tokens).int()
            places.append(slots[-count:])
            ops.store_kv(*torch.randn(2, context, kv_heads, dim).to(dtype), pool, slots)
        self.slots, tokens = torch.cat(places), int(lengths.sum())
        self.k, self.v = torch.randn(2, tokens, kv_heads, dim).to(dtype)
        # A view of what one projection made: no query lies right behind the one before it.
        self.q = torch.randn(tokens, heads + 2 * kv_heads, dim).to(dtype)[:, :heads]
        self.kind = Kind(heads, kv_heads, dim, self.scores)

    def expected(self):
        """The answers of our reference, in float32 on the host."""
        kv = KvPages([PageShape(self.kind.kv_heads, self.kind.head_dim)], self.kv.pages, self.kv.page_tokens, self.kv.layers[0].dtype)
        kv.layers[0].copy_(self.kv.layers[0])
        batch = self.batch(torch.device("cpu"), None)
        step = Native().plan(batch, kv)
        step.store(0, self.k, self.v)
        s, given = self.scores, (batch.query_start, batch.contexts, batch.page_table)
        return reference(self.q.float(), kv.layers[0], *given, s.scale, s.window, s.softcap, s.slopes, sinks=s.sinks)

    def there(self, package, place):
        """The backend, its pool, the scores, queries, keys and values on a device."""
        s = self.scores
        scores = Scores(s.scale, s.window, to(place, s.slopes), s.softcap, to(place, s.sinks))
        kind = Kind(self.kind.heads, self.kind.kv_heads, self.kind.head_dim, scores)
        backend = flashinfer.FlashInfer(package, [kind], self.q.dtype, place)
        assert list(backend.serving(self.kv.layers[0].dtype).values()) == ["flashinfer"]
        kv = KvPages([PageShape(kind.kv_heads, kind.head_dim)], self.kv.pages, self.kv.page_tokens, self.kv.layers[0].dtype, place)
        kv.layers[0].copy_(self.kv.layers[0])
        fused = torch.cat([self.q, self.k, self.v], 1).to(place)
        return backend, kv, scores, *fused.split([kind.heads, kind.kv_heads, kind.kv_heads], 1)

    def found(self, package, place, told=True):
        """FlashInfer's answers. told: the rows are known on the host"""
        backend, kv, scores, q, k, v = self.there(package, place)
        step = backend.plan(self.batch(place, self.host if told else None), kv)
        return step.run(0, q, k, v, scores).cpu()

    def batch(self, place, host):
        rows = [torch.from_numpy(rows).to(place) for rows in (self.host.query_start, self.host.contexts, self.host.page_table)]
        none = torch.empty(0, dtype=torch.int64)
        return ForwardBatch(none, none, *rows, self.slots.to(place), none, None, host=host)


def to(place, tensor):
    return None if tensor is None else tensor.to(place)


CASES = {
    "two queries to a key": {},
    "as many": {"heads": 3, "kv_heads": 3},
    "a group that is no power of two": {"heads": 7, "kv_heads": 1},
    "eight": {"heads": 16, "dim": 128},
    "heads of 256": {"dim": 256},
    "pages of one": {"page_tokens": 1},
    "a scale": {"scale": 0.3},
    "a window": {"window": 5},
    "a window of one": {"window": 1},
    "a soft cap": {"softcap": 0.7, "scale": 0.5},
    "slopes": {"heads": 6, "kv_heads": 2, "slopes": alibi_slopes(6)},
    "sinks": {"sinks": torch.tensor([1.0, -2.0, 4.0, 0.5])},
    "sinks over a window": {"sinks": torch.tensor([1.0, -2.0, 4.0, 0.5]), "window": 5, "scale": 0.3},
    "e4m3": {"stored": torch.float8_e4m3fn},
    "e5m2": {"stored": torch.float8_e5m2, "heads": 8},
}


@pytest.mark.parametrize(("rows", "dtype"), [(MIXED, torch.bfloat16), (SINGLE, torch.float16)], ids=["mixed", "single"])
@pytest.mark.parametrize("case", CASES)
def test_its_answers_are_those_of_the_reference(case, rows, dtype, gpu, package):
    asked = Case(rows, dtype, **CASES[case])
    expected = asked.expected()
    # 8-bit floats are multiplied as they are kept, so both sides see the same keys.
    assert (asked.found(package, gpu.place).float() - expected).abs().max() < SIXTEEN[dtype] * max(1.0, expected.abs().max())
    if package is stand_in:
        assert ran("run") == [SINK if "sinks" in CASES[case] else DECODE if rows is SINGLE else PREFILL]


@pytest.mark.parametrize("case", ["two queries to a key", "a group that is no power of two", "slopes", "sinks over a window"])
def test_a_captured_step_attends_for_the_rows_that_it_is_renewed_for(case, gpu, package):
    asked = Case(SINGLE, torch.float16, **CASES[case])
    backend, kv, scores, q, k, v = asked.there(package, gpu.place)
    batch = asked.batch(gpu.place, asked.host)
    nobodys = next(page for page in range(kv.pages) if page not in asked.host.page_table)
    own = replace(
        batch,
        contexts=torch.ones_like(batch.contexts),
        page_table=torch.full_like(batch.page_table, nobodys),
        slots=torch.full_like(batch.slots, nobodys * kv.page_tokens),
        host=None,
    )
    step, out = backend.fixed(own, kv), torch.zeros_like(q)

    def run():
        out.copy_(step.run(0, q, k, v, scores))

    run()
    launch = Captures().capture(run)
    for name in ("contexts", "page_table", "slots"):
        getattr(own, name).copy_(getattr(batch, name))
    step.renew(batch)
    launch()
    assert (out.cpu().float() - asked.expected()).abs().max() < SIXTEEN[torch.float16] * max(1.0, asked.expected().abs().max())


def test_rows_that_only_the_device_knows_are_planned_when_a_layer_comes(gpu, package):
    told, untold = (Case(MIXED, torch.float16).found(package, gpu.place, told) for told in (True, False))
    assert torch.equal(told, untold)


# What tiny models ask of attention, and the wrappers that answer: all of it, windows, caps, slopes, sinks, slopes of another scale.
SERVED = {
    "llama": {PREFILL, DECODE},
    "mistral": {PREFILL, DECODE},
    "gemma2": {PREFILL, DECODE},
    "bloom": {PREFILL, DECODE},
    "gpt_oss": {SINK},
    "falcon_rw": set(),
}
ASKED = prompts(lengths=(1, 5, 7, 19))


@pytest.fixture
def truth(row, checkpoint):
    """transformers' logits for ASKED, computed on the host: ask for it before `gpu`."""
    return torch.cat(oracle(checkpoint(row), ASKED))


@pytest.mark.parametrize("row", SERVED)
def test_logits_equal_transformers(row, truth, gpu, wide, checkpoint):
    runner = Runner()
    runner.load(checkpoint(row), device=gpu, attention="flashinfer")
    runner.expect({index: len(prompt) for index, prompt in enumerate(ASKED)})
    logits = [[] for _ in ASKED]
    # Prompts, then what is left of them beside a new one, then single tokens.
    for cut in (slice(0, -3), slice(-3, -1), slice(-1, None)):
        rows = [(index, prompt[cut]) for index, prompt in enumerate(ASKED) if prompt[cut]]
        for (index, _), part in zip(rows, runner.step(rows).split([len(tokens) for _, tokens in rows])):
            logits[index].append(part.cpu())
    assert distance(torch.cat([part for parts in logits for part in parts]), truth) < CLOSE
    assert set(ran("run")) == SERVED[row]


def test_an_engine_plans_each_step_once_for_each_shape_of_layers_from_what_the_host_knows(gpu, wide, checkpoint, monkeypatch):
    def answers(**how):
        model = load_model(checkpoint("gemma2"), dtype="float32", device=gpu, **how)
        engine = Engine(model, Group.single(), MemoryBudget(1 << 26, 1 << 26), PAGE_TOKENS)
        engine.warm()
        engine.reserve(PAGES, STEP_TOKENS, SEQUENCES, 0)
        stand_in.CALLS.clear()
        driver = Driver(engine.step)
        for index, prompt in enumerate(ASKED):
            driver.add(index, prompt, 5)
        return driver.run(chunk=8), driver.number, engine.describe()["kernels"]

    expected, *_ = answers(attention="native")
    assert not stand_in.CALLS
    monkeypatch.setattr(flashinfer, "_fetched", None)
    found, steps, kernels = answers()
    assert found == expected
    # Three layers, some with a window.
    assert len(ran("plan")) == 2 * steps and len(ran("run")) == 3 * steps
    said = {name: server for name, server in kernels.items() if name.startswith("attention, ")}
    assert said == {
        "attention, 4 heads over 2 of 24, soft cap 3": "flashinfer",
        "attention, 4 heads over 2 of 24, window 8, soft cap 3": "flashinfer",
    }


@pytest.mark.parametrize("row", ["gemma2", "gpt_oss"])
def test_captured_steps_are_planned_anew_before_each_launch(row, gpu, wide, checkpoint):
    def answers(attention, captured):
        model = load_model(checkpoint(row), dtype="float32", device=gpu, attention=attention)
        engine = Engine(model, Group.single(), MemoryBudget(1 << 26, 1 << 26), PAGE_TOKENS, captured=captured)
        assert engine.reserve(PAGES, STEP_TOKENS, SEQUENCES, 0).captured == captured
        stand_in.CALLS.clear()
        driver = Driver(engine.step)
        for index, prompt in enumerate(ASKED):  # one after another: steps of one to four rows, some of them nobody's
            driver.add(index, prompt, 3 + 2 * index)
            driver.turn()
        return driver.run()

    expected = answers("native", ())
    assert answers("flashinfer", (1, 2, 4)) == expected
    # What a capture runs is not called again, but what plans it is.
    plans = [(name, len(args[0]) - 1) for name, method, args, _ in stand_in.CALLS if method == "plan"]
    assert {rows for name, rows in plans if name == (SINK if row == "gpt_oss" else DECODE)} >= {1, 2, 4}
    assert not any(method == "run" and len(args[0]) == 2 for _, method, args, _ in stand_in.CALLS)


def test_a_step_is_planned_while_the_one_before_runs(gpu, wide, checkpoint):
    model = load_model(checkpoint("gemma2"), dtype="float32", device=gpu)
    engine = Engine(model, Group.single(), MemoryBudget(1 << 26, 1 << 26), PAGE_TOKENS, captured=(2, 4))
    found = []
    for follow in (
        Driver(engine.step),
        Ahead(launches := Launches(SimpleNamespace(each=lambda call: [call(engine)], placed=lambda step: step))),
    ):
        engine.reserve(PAGES, STEP_TOKENS, SEQUENCES, 0)
        for index, prompt in enumerate(ASKED):
            follow.add(index, prompt, 4 + index)
            follow.turn()
        found.append(follow.run())
    assert found[0] == found[1]
    assert launches.waits and not [before for before, _ in launches.waits if before]


PLAIN = Scores(0.125)


@pytest.mark.parametrize(("kind", "dtype", "stored", "lacking"), [
    (Kind(4, 2, 64, PLAIN), torch.float16, torch.float16, ""),
    (Kind(4, 2, 64, PLAIN), torch.float32, torch.float32, "queries in float32"),
    (Kind(4, 2, 80, PLAIN), torch.float16, torch.float16, "heads of 80"),
    (Kind(4, 2, 64, PLAIN), torch.float16, torch.int8, "pages in int8"),
    (Kind(4, 2, 64, PLAIN), torch.float16, torch.bfloat16, "pages in bfloat16"),
    (Kind(4, 1, 128, Scores(1.0, value_dim=96)), torch.float16, torch.float16, "a value within the key"),
    (Kind(4, 2, 64, PLAIN, PageUse.MEMORY), torch.float16, torch.float16, "what sees a source at once"),
    (Kind(4, 2, 64, Scores(1.0, relative=torch.ones(4, 3))), torch.float16, torch.float16, "learned distances"),
    (Kind(4, 2, 64, Scores(1.0, slopes=alibi_slopes(4))), torch.float16, torch.float16, ""),
    (Kind(4, 2, 64, Scores(1.0, slopes=alibi_slopes(8)[:4])), torch.float16, torch.float16, "slopes but those of all heads of a model"),
    (Kind(4, 2, 64, Scores(1.0, slopes=alibi_slopes(4), softcap=2.0)), torch.float16, torch.float16, "slopes beside caps or sinks"),
    (Kind(4, 2, 64, Scores(1.0, sinks=torch.ones(4), softcap=2.0)), torch.float16, torch.float16, "caps beside sinks"),
    (Kind(4, 2, 64, Scores(1.0, sinks=torch.ones(4))), torch.float16, torch.float8_e4m3fn, "pages in fp8_e4m3fn beside sinks"),
], ids=lambda value: stored_name(value) if isinstance(value, torch.dtype) else str(value) or "-")  # fmt: skip
def test_what_it_lacks_is_named_beside_the_layers_that_lack_it(kind, dtype, stored, lacking):
    backend = flashinfer.FlashInfer(stand_in, [kind], dtype, torch.device("cpu"))
    served = f"triton, for FlashInfer lacks {lacking}" if lacking else "flashinfer"
    assert backend.serving(stored) == {f"attention, {kind}": served}
    assert (backend.shape(kind, stored) is None) is bool(lacking)


@pytest.mark.parametrize(("capability", "found", "why"), [
    (None, {"flashinfer"}, "FlashInfer computes on GPUs, and this shard does not"),
    ((7, 5), {"flashinfer"}, r"needs compute capability 8\.0, and this GPU has 7\.5"),
    ((9, 0), set(), r"not installed; pip install 'kvrun\[cuda\]'"),
    ((9, 0), {"flashinfer"}, "nvcc is not here"),
    ((9, 0), {"flashinfer", "flashinfer_jit_cache"}, None),
])  # fmt: skip
def test_where_it_cannot_serve_it_is_refused_and_auto_goes_on(capability, found, why, monkeypatch, caplog):
    monkeypatch.setattr(flashinfer, "find_spec", lambda name: name if name in found else None)
    monkeypatch.setattr(flashinfer, "library", lambda: stand_in)
    monkeypatch.setattr(flashinfer, "_compiler", lambda: False)
    caplog.set_level("INFO", "kvrun.attention")
    place = torch.device("cpu")
    made = choose_attention("auto", place, capability)([], torch.float16)
    assert isinstance(made, flashinfer.FlashInfer if why is None else Native)
    assert len(caplog.records) == (why is not None and capability is not None)
    assert isinstance(choose_attention("native", place, capability)([], torch.float16), Native)
    if why is not None:
        with pytest.raises(DeviceError, match=f"^--attention flashinfer was asked for on cpu: .*{why}.*; or use --attention native"):
            choose_attention("flashinfer", place, capability)


def test_a_package_that_cannot_be_imported_is_no_reason_to_die(monkeypatch):
    def broken():
        raise AttributeError("no attribute cudaLibrary_t")

    monkeypatch.setattr(flashinfer, "find_spec", lambda name: name)
    monkeypatch.setattr(flashinfer, "library", broken)
    assert flashinfer.missing((9, 0)) == "FlashInfer is installed and cannot be imported: no attribute cudaLibrary_t"


def test_it_is_refused_before_a_model_is_looked_at(tmp_path):
    with gpus(0), pytest.raises(DeviceError, match="--attention flashinfer was asked for on cpu") as error:
        load_model(tmp_path / "nothing", attention="flashinfer")
    assert error.value.exit_code == 14


WRAPPERS = [getattr(stand_in, name) for name in (PREFILL, DECODE, SINK)]


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="flashinfer-python: not installed")
@pytest.mark.parametrize("ours", WRAPPERS, ids=lambda ours: ours.__name__)
@pytest.mark.parametrize("method", ["__init__", "plan", "run"])
def test_the_stand_in_has_the_signatures_of_the_package(ours, method):
    theirs = signature(ours.__name__, method)
    names = list(theirs)
    for at, parameter in enumerate(inspect.signature(getattr(ours, method)).parameters.values()):
        assert parameter.name in theirs, f"{ours.__name__}.{method} takes no {parameter.name}"
        real = theirs[parameter.name]
        by_name = inspect.Parameter.KEYWORD_ONLY
        # What the package takes by its place has its place here; what it takes by name only, we may not give by place.
        assert real.kind == by_name or names[at] == parameter.name
        assert real.default == parameter.default


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="flashinfer-python: not installed")
@pytest.mark.parametrize("gpu", ["stand-in"], indirect=True)
def test_the_package_takes_every_call_that_is_made(gpu, package):
    for case in CASES.values():
        for rows in (MIXED, SINGLE):
            asked = Case(rows, torch.float16, **case)
            asked.found(package, gpu.place)
            backend, kv, *_ = asked.there(package, gpu.place)
            backend.fixed(asked.batch(gpu.place, asked.host), kv)
    assert {(name, method) for name, method, *_ in stand_in.CALLS} == {
        (w.__name__, m) for w in WRAPPERS for m in ("__init__", "plan", "run")
    }
    for name, method, args, kwargs in stand_in.CALLS:
        inspect.Signature(list(signature(name, method).values())).bind(None, *args, **kwargs)


def signature(name, method):
    """The parameters of the package's method; some of its versions take those of `plan` through another."""
    wrapper = getattr(import_module("flashinfer"), name)
    if method == "plan":
        method = "_plan_impl" if hasattr(wrapper, "_plan_impl") else method
    return inspect.signature(getattr(wrapper, method)).parameters
