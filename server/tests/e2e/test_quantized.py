"""A model that the command quantized, served: the folder needs no flag, and answers as codes that are made at load."""

import subprocess

from tree import BIN, DEMO, PROMPTS, demo_adapters, running, together

NEW = 48
SERVER = BIN / "text-generation-server"


def ids_of_all(tree, **parameters) -> list[list[int]]:
    answers = together([lambda p=p: tree.generate(p, max_new_tokens=NEW, **parameters) for p in PROMPTS])
    assert not [a.error for a in answers if a.error]
    return [a.ids for a in answers]


def test_a_stored_model_answers_on_two_ranks_as_codes_made_at_load(tmp_path):
    out = tmp_path / "demo-int4"
    done = subprocess.run([SERVER, "quantize", DEMO / "model", out, "--method", "int4"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == f"{out}\n", done.stderr
    name, adapter = next(iter(demo_adapters().items()))
    said = []
    for flags in (["--model-id", str(out)], ["--model-id", str(DEMO / "model"), "--quantize", "int4"]):
        with running(*flags, "--dtype", "float32", "--num-shard", "2", "--lora-ids", f"{name}={adapter}") as tree:
            assert len(tree.shards()) == 2
            said.append([ids_of_all(tree), ids_of_all(tree, adapter_id=name)])
    stored, made = said
    assert stored == made and stored[0] != stored[1] and all(len(set(ids)) > 3 for ids in stored[0])
