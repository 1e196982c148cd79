"""What the kernels' tests share: every level this machine has, and one way to compare with a reference."""

import kvrun_kernels
import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# One rounding of a result near 1, with a little room: the sums themselves are float32 on both sides.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def pytest_configure(config):
    config.addinivalue_line("markers", "punica_test: adapters of many ranks in one batch, and the kernels below them")


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
