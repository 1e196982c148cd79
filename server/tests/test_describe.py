"""The tree of every tiny model, held by snapshots: the review of a change to a description is its snapshot's diff.

Run with KVRUN_UPDATE_SNAPSHOTS=1 to write them anew.
"""

import json
import os
from pathlib import Path

import pytest
from kvrun.models import falcon, gpt2, llama, mistral, qwen2  # noqa: F401
from kvrun.spec import Config, describe, model_of, served
from tiny import ROWS

SNAPSHOTS = Path(__file__).parent / "snapshots"


def config_of(row: str, tmp_path: Path) -> Config:
    """The config as transformers saves it."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind, fields = ROWS[row]
    config = CONFIG_MAPPING[kind](**fields)
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(tmp_path)
    return Config.read(tmp_path)


@pytest.mark.parametrize("row", ROWS)
def test_a_model_is_described_as_its_snapshot_says(row, tmp_path):
    text = describe(model_of(config_of(row, tmp_path)))
    snapshot = SNAPSHOTS / f"{row}.txt"
    if os.environ.get("KVRUN_UPDATE_SNAPSHOTS"):
        snapshot.write_text(text)
    assert text == snapshot.read_text(), f"review the difference, then set KVRUN_UPDATE_SNAPSHOTS=1 to accept it ({snapshot.name})"


def test_every_served_architecture_has_a_tiny_row(tmp_path):
    seen = {name for row in ROWS for name in config_of(row, tmp_path).get("architectures")}
    aliases = {"RWForCausalLM"}  # Falcon's first name; test_config.py holds it equal to the present one
    assert set(served()) == seen | aliases


def test_every_snapshot_has_its_row():
    assert {p.stem for p in SNAPSHOTS.glob("*.txt")} == set(ROWS)


def test_a_rewritten_config_is_described_the_same(tmp_path):
    config = config_of("llama_tied", tmp_path)
    older = json.loads((tmp_path / "config.json").read_text())
    parameters = older.pop("rope_parameters")
    older |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters, "torch_dtype": older.pop("dtype", None)}
    assert describe(model_of(Config(older))) == describe(model_of(config))
