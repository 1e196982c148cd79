"""What the kernels' tests share: every level and device this machine has, and one way to compare with a reference."""

import os

import kvrun_kernels
import pytest
import torch

# Read when Triton is imported, so it is settled here, before any test: compiled where there is a GPU, else interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# One rounding of a result near 1, with a little room: the sums themselves are float32 on both sides.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def pytest_configure(config):
    config.addinivalue_line("markers", "punica_test: adapters of many ranks in one batch, and the kernels below them")
    config.addinivalue_line("markers", "gpu: Triton's code compiled, on a CUDA device")


def pytest_collection_modifyitems(items):
    for item in items:
        if "kvrun_kernels" in str(item.path):
            item.add_marker(pytest.mark.punica_test)


@pytest.fixture(params=kvrun_kernels.levels() or ("reference",))
def level(request):
    """Runs the test once per instruction set level of this machine."""
    kvrun_kernels.use(request.param)
    yield request.param
    kvrun_kernels.use("native")


@pytest.fixture(params=("interpreter", pytest.param("cuda", marks=pytest.mark.gpu)))
def device(request):
    """Runs the test on Triton's code: interpreted over tensors of the CPU, or compiled for the GPU."""
    if request.param == "cuda" and (INTERPRETING or not torch.cuda.is_available()):
        pytest.skip("a CUDA device and Triton's compiler (TRITON_INTERPRET unset): not here")
    if request.param == "interpreter" and not INTERPRETING:
        pytest.skip("Triton's interpreter: not on, set TRITON_INTERPRET=1")
    if request.param == "interpreter":
        kvrun_kernels.use("triton")
        yield request.param
        kvrun_kernels.use("native")
        return
    with torch.device("cuda"):
        yield request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture
def close():
    """Assert that a result equals its reference up to one rounding of its dtype, relative to its size."""

    def check(found: torch.Tensor, expected: torch.Tensor, factor: float = 1.0):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        room = factor * TOLERANCE[found.dtype]
        torch.testing.assert_close(found, expected, rtol=room, atol=room)

    return check


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)
