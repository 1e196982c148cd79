"""The README says what the registry and the tests say."""

from kvrun.spec import registry
from support_table import README, architecture_of, renewed
from tiny import ROWS


def test_the_readme_table_is_fresh():
    assert README.read_text() == renewed(README.read_text()), "run `make docs`"


def test_every_served_architecture_is_compared_with_transformers():
    tested = {architecture_of(row) for row in ROWS.values()}
    old_names = {"RWForCausalLM", "MPTForCausalLM", "PhiMoEForCausalLM"}  # that first checkpoints carry
    assert set(registry.served()) - old_names == tested
