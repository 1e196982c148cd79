"""The commands of text-generation-server: quick without torch, strict about flags, fixed exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kvrun import cli
from kvrun.cli import COMMANDS, main
from kvrun.config import ServeConfig
from kvrun.errors import ConfigError, DeviceError
from wire import Shard, spawn

SERVE = ["model", "--uds-path", "run/shard-0"]


def run(*args: object, **options) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that ends by itself."""
    process = spawn(*args, **options)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def test_help_names_every_command_and_imports_neither_torch_nor_grpclib():
    code, out, _ = run("--help")
    assert code == 0 and all(name in out for name in COMMANDS)
    script = (
        "import sys, kvrun.cli as c; c.main(['--help']); c.main(['serve']); print(sorted({'torch', 'grpclib', 'numpy'} & set(sys.modules)))"
    )
    path = str(Path(__file__).resolve().parents[1])
    said = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "[]"


def test_flags_become_a_config():
    config = ServeConfig.parse(
        [*SERVE, "--rank", "1", "--world-size", "2", "--rendezvous", "r", "--dtype", "bfloat16", "--json-output"], {}
    )
    assert (config.model_dir, config.uds_path, config.rendezvous) == (Path("model"), Path("run/shard-0"), Path("r"))
    assert (config.rank, config.world_size, config.dtype, config.model_id) == (1, 2, "bfloat16", "model")
    assert config.quantize is None and config.death_fd is None and config.json_output and config.page_tokens == 16
    assert ServeConfig.parse([*SERVE, "--quantize", "awq", "--model-id", "me"], {"KVRUN_DEATH_FD": "7"}).death_fd == 7


@pytest.mark.parametrize(
    ("flags", "environ", "named"),
    [
        (["--rank", "2", "--world-size", "2", "--rendezvous", "r"], {}, "--rank 2 is not below"),
        (["--world-size", "2"], {}, "--rendezvous"),
        (["--world-size", "2", "--rendezvous", "nowhere/file"], {}, "--rendezvous"),
        (["--dtype", "int3"], {}, "--dtype"),
        (["--page-tokens", "0"], {}, "--page-tokens 0"),
        (["--adapter-bytes", "-1"], {}, "--adapter-bytes -1"),
        (["--no-such-flag"], {}, "--no-such-flag"),
        ([], {"KVRUN_DEATH_FD": "x"}, "KVRUN_DEATH_FD"),
    ],
)
def test_a_wrong_flag_is_named(flags, environ, named):
    with pytest.raises(ConfigError, match=named):
        ServeConfig.parse([*SERVE, *flags], environ)


@pytest.mark.parametrize("argv", [["fly"], ["serve"], ["quantize", "model"], []])
def test_a_wrong_command_line_exits_10(argv, capsys):
    assert main(argv) == 10
    captured = capsys.readouterr()
    assert "text-generation-server" in captured.err + captured.out


def test_the_version_is_printed(capsys):
    from kvrun import __version__

    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == __version__


def test_describe_prints_the_tree(checkpoint, capsys):
    assert main(["describe", "--model-id", str(checkpoint("llama"))]) == 0
    assert "q_proj" in capsys.readouterr().out


def _broken(edit):
    def checkpoint_with(source: Path, at: Path) -> Path:
        at.mkdir()
        for file in source.iterdir():
            (at / file.name).write_bytes(file.read_bytes())
        edit(at)
        return at

    return checkpoint_with


def _edit(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


FAILURES = {
    "unknown architecture": (_broken(lambda at: _edit(at, architectures=["NoSuchModel"])), [], 10),
    "no weights": (_broken(lambda at: (at / "model.safetensors").unlink()), [], 11),
    "short weights": (_broken(lambda at: (at / "model.safetensors").write_bytes(b"\0" * 40)), [], 11),
    "nothing to round": (_broken(lambda at: None), ["--activation-dtype", "int8"], 10),
    "no room for a page": (_broken(lambda at: None), ["--kv-cache-bytes", "100"], 12),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_model_that_cannot_be_served_ends_with_its_code_and_one_line(what, checkpoint, tmp_path):
    make, flags, code = FAILURES[what]
    shard = Shard(make(checkpoint("llama"), tmp_path / "model"), tmp_path / "shard", *flags)
    try:
        _, said = shard.process.communicate(timeout=120)
    finally:
        shard.end()
    assert shard.process.returncode == code
    events = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [event["level"] for event in events] == ["ERROR"] and "Traceback" not in said


def test_a_socket_that_cannot_be_bound_exits_10(checkpoint, tmp_path):
    code, _, said = run("serve", checkpoint("llama"), "--uds-path", tmp_path / "nowhere" / "shard")
    assert code == 10 and "--uds-path" in said


def test_ranks_that_do_not_meet_are_a_failure_of_the_device(checkpoint, tmp_path, monkeypatch):
    def late(*_):
        raise RuntimeError("timed out")

    monkeypatch.setattr("kvrun.dist.Group.join", late)
    config = ServeConfig.parse([*SERVE, "--world-size", "2", "--rendezvous", str(tmp_path / "file")], {})
    with pytest.raises(DeviceError, match="did not meet"):
        cli._load(config)
    assert DeviceError.exit_code == 14


def test_serving_imports_no_compiler_and_no_transformers(checkpoint):
    script = (
        "import sys, kvrun.cli as c; from kvrun.config import ServeConfig; "
        f"c._load(ServeConfig.parse([{str(checkpoint('llama'))!r}, '--uds-path', 's'])); "
        "print([m for m in ('torch._dynamo', 'torch._inductor', 'transformers', 'peft', 'sympy') if m in sys.modules])"
    )
    process = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": f"{Path(__file__).resolve().parents[1]}:{Path(__file__).resolve().parents[2] / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0 and process.stdout.splitlines()[-1] == "[]", process.stderr
