"""A pass made again: the same calls over new numbers, and nothing of other threads or of PyTorch among them."""

import itertools
import threading

import pytest
import torch

import kvrun_kernels
from kvrun_kernels import dispatch, ops, recording
from kvrun_kernels.recording import Arena, Recording

pytestmark = pytest.mark.skipif(not kvrun_kernels.levels(), reason="native.so: not built")


class Layer:
    """A norm, a product and a sum, as a model has them."""

    def __init__(self, width: int = 96):
        self.weight, self.packed = torch.randn(width), ops.pack_linear(torch.randn(2 * width, width))

    def __call__(self, x: torch.Tensor) -> None:
        ops.add_(x, ops.act_mul(ops.linear(ops.rms_norm(x, self.weight, 1e-5), self.packed), "silu"), 0.5)


def test_a_recording_computes_again_over_what_lies_there_now(level):
    layers, x, arena = [Layer(), Layer()], torch.randn(3, 96), Arena()
    recorded = Recording(arena)
    first, given = x.clone(), x.clone()
    with recorded:
        for layer in layers:
            arena.reset()
            layer(x)
    assert recorded.whole
    for layer in layers:
        layer(given)
    assert torch.equal(x, given), "what is recorded is computed as well"
    for numbers in (torch.randn(3, 96), first):
        x.copy_(numbers)
        recorded.replay()
        for layer in layers:
            layer(numbers)
        assert torch.equal(x, numbers)


def test_floats_and_missing_tensors_arrive_where_they_belong(level):
    q, pool = torch.randn(2, 4, 32), torch.randn(6, 2, 2, 16, 32)
    one, contexts = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([40, 9], dtype=torch.int32)
    table = torch.tensor([[3, 1, 5], [0, 0, 0]], dtype=torch.int32)
    recorded = Recording(Arena())
    with recorded:
        found = ops.paged_attention(q, pool, one, contexts, table, 0.17, window=20, softcap=3.0)
    expected = found.clone()
    found.zero_()
    recorded.replay()
    assert torch.equal(found, expected) and expected.any()


def test_what_pytorch_computes_is_told_apart():
    x = torch.ones(2, 8)
    with Recording(Arena()) as views:
        x.view(4, 4)[1:].unsqueeze(0)
    with Recording(Arena()) as mixed:
        x.mul_(2)
    assert views.whole and not mixed.whole
    kvrun_kernels.use("reference")
    try:
        with Recording(Arena()) as plain:
            ops.rms_norm(x, torch.ones(8), 1e-5)
    finally:
        kvrun_kernels.use("native")
    assert not plain.whole


def test_calls_of_other_threads_are_not_recorded():
    layer, mine, other = Layer(), torch.randn(2, 96), torch.randn(2, 96)
    with Recording(Arena()) as recorded:
        thread = threading.Thread(target=layer, args=(other,))
        thread.start()
        thread.join()
        layer(mine)
    before = other.clone()
    recorded.replay()
    assert torch.equal(other, before)


def test_memory_is_lent_again_only_after_a_reset():
    arena = Arena()
    taken = [arena.take((300, 700), torch.float32) for _ in range(4)] + [arena.take((3,), torch.bfloat16)]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in taken)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    arena.reset()
    assert {t.data_ptr() for t in taken} == {arena.take(tuple(t.shape), t.dtype).data_ptr() for t in taken}


def test_every_op_takes_no_more_than_a_recorded_call_holds():
    for kernel in dispatch._kernels.values():
        letters = [kind._type_ for kind in kernel._types]
        assert letters.count("f") <= recording._FLOATS and len(letters) - letters.count("f") <= recording._INTEGERS, kernel.name
