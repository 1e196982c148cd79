"""Fixtures of the end-to-end tests: one running demo tree for all tests of the session that only read from it."""

import pytest
from tree import BIN, DEMO, demo_flags, running


@pytest.fixture(scope="session")
def demo():
    if not (BIN / "text-generation-launcher").exists():
        pytest.skip("text-generation-launcher is not installed: run `make install`")
    if not (DEMO / "model" / "config.json").exists():
        pytest.skip("the demo model is missing from examples/demo/model")
    with running(*demo_flags()) as tree:
        yield tree
