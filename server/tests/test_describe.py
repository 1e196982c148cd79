"""The tree of every tiny model, held by snapshots: the review of a change to a description is its snapshot's diff.

Run with KVRUN_UPDATE_SNAPSHOTS=1 to write them anew.
"""

import copy
import os
from pathlib import Path

import kvrun.models  # noqa: F401  (registers every family)
import pytest
from kvrun.spec import Config, describe, model_of, served
from support_table import architecture_of
from tiny import ROWS

SNAPSHOTS = Path(__file__).parent / "snapshots"


@pytest.mark.parametrize("row", ROWS)
def test_a_model_is_described_as_its_snapshot_says(row, checkpoint):
    text = describe(model_of(Config.read(checkpoint(row))))
    snapshot = SNAPSHOTS / f"{row}.txt"
    if os.environ.get("KVRUN_UPDATE_SNAPSHOTS"):
        snapshot.write_text(text)
    assert text == snapshot.read_text(), f"review the difference, then set KVRUN_UPDATE_SNAPSHOTS=1 to accept it ({snapshot.name})"


def test_every_served_architecture_has_a_tiny_row():
    seen = {architecture_of(row) for row in ROWS.values()}
    aliases = {"RWForCausalLM", "MPTForCausalLM", "PhiMoEForCausalLM"}  # first names of the present ones; tests hold them equal
    assert set(served()) == seen | aliases


def test_every_snapshot_has_its_row():
    assert {p.stem for p in SNAPSHOTS.glob("*.txt")} == set(ROWS)


def test_a_rewritten_config_is_described_the_same(checkpoint):
    config = Config.read(checkpoint("llama_tied"))
    older = copy.deepcopy(config.fields)
    parameters = older.pop("rope_parameters")
    older |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters, "torch_dtype": older.pop("dtype", None)}
    assert describe(model_of(Config(older))) == describe(model_of(config))
