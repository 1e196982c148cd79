"""What the launcher promises: clear errors with fixed exit codes before any work, no orphans, two instances side by side."""

import json
import os
import random
import shutil
import signal
import socket
import time

import pytest
from tree import DEMO, demo_adapters, demo_flags, descendants, launch, running, wait_ready

LAUNCHER_KILLS = int(os.environ.get("KVRUN_LAUNCHER_KILLS", "4"))


def ended(tree, timeout=60) -> tuple[int, str]:
    code = tree.process.wait(timeout)
    time.sleep(0.1)
    return code, "\n".join(tree.log)


def copy_of_demo(tmp_path):
    return shutil.copytree(DEMO / "model", tmp_path / "model")


def test_a_port_in_use_ends_the_launcher_with_13():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, log = ended(launch(*demo_flags(), port=taken.getsockname()[1]))
    assert code == 13
    assert "in use" in log


def short_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def no_file(folder):
    (folder / "model.safetensors").unlink()


def garbage(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def without_a_field(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(config))


def unknown_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamoForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "code", "says"),
    [
        (short_file, 11, "model.safetensors"),
        (no_file, 11, "safetensors"),
        (garbage, 11, "model.safetensors"),
        (without_a_field, 10, "num_attention_heads"),
        (unknown_architecture, 10, "LlamaForCausalLM"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_a_spoilt_checkpoint_is_refused_by_name(spoil, code, says, tmp_path):
    folder = copy_of_demo(tmp_path)
    spoil(folder)
    got, log = ended(launch("--model-id", str(folder)))
    assert (got, says in log) == (code, True), log


def test_an_adapter_that_is_not_there_is_refused_before_anything_starts(tmp_path):
    code, log = ended(launch("--model-id", str(DEMO / "model"), "--lora-ids", f"ghost={tmp_path}/ghost"))
    assert code == 11 and "ghost" in log


@pytest.mark.parametrize(
    "flags",
    [["--quantize", "exl2"], ["--num-shard", "0"], ["--max-total-tokens", "8", "--max-input-tokens", "9"], ["--hostname", "0.0.0.0"]],
    ids=str,
)
def test_an_impossible_flag_is_refused_with_10(flags):
    code, log = ended(launch(*demo_flags(), *flags))
    assert code in (2, 10), log
    assert flags[0] in log


def test_plan_prints_and_stops():
    code, log = ended(launch(*demo_flags(), "--plan"))
    assert code == 0, log
    for word in ("weights", "pages", *demo_adapters()):
        assert word in log.lower(), log


def test_a_cache_of_8_bits_is_planned_and_served():
    code, log = ended(launch(*demo_flags(adapters=False), "--kv-cache-dtype", "int8", "--plan"))
    assert code == 0 and "tokens in int8" in log, log
    with running(*demo_flags(adapters=False), "--kv-cache-dtype", "int8") as tree:
        with tree.client() as http:
            assert http.get("/info").json()["kv_dtype"] == "int8"
        assert len(tree.generate("Once upon a time", max_new_tokens=8).ids) == 8


def test_sigterm_drains_and_ends_with_0():
    with running(*demo_flags()) as tree:
        assert tree.generate("The cat", max_new_tokens=4).error is None
        pids = descendants(tree.process.pid)
        assert tree.stop() == 0
        assert pids and not [pid for pid in pids if pid in descendants(1)]


def test_two_instances_never_meet():
    with running(*demo_flags(adapters=False)) as one, running(*demo_flags()) as two:
        assert one.generate("The cat", max_new_tokens=8).ids == two.generate("The cat", max_new_tokens=8).ids
        one.stop()
        assert two.generate("The cat", max_new_tokens=8).error is None


def test_a_killed_launcher_leaves_no_process():
    moments = random.Random(0)
    for kill in range(LAUNCHER_KILLS):
        tree, moment = launch(*demo_flags()), 0.05 + moments.random() * 2.5
        if kill % 2:  # every other one when all of it runs
            wait_ready(tree)
        else:
            time.sleep(moment)
        pids = set(descendants(tree.process.pid))
        assert len(pids) >= (2 if kill % 2 else 0)
        tree.process.send_signal(signal.SIGKILL)
        tree.process.wait()
        time.sleep(2)
        assert not pids & set(descendants(1)), f"left by kill {kill}, after {moment:.2f} s or when ready"
