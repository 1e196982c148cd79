"""The rules of the house, held by a program: who may know whom, how long a file may be, who reads the environment."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "server" / "kvrun"

# What each room of the shard may import besides itself and the standard library. An arrow of ARCHITECTURE.md is a row here.
MAY_IMPORT = {
    "spec": {"errors"},
    "models": {"spec"},
    "dist": {"errors"},
    "underway": set(),
    "device": {"errors", "underway"},
    "errors": set(),
    "gguf": {"errors"},
    "hub": {"errors", "config", "gguf"},
    "inspect": {"errors", "hub", "config", "spec", "models", "weights"},
    "weights": {"spec", "state", "dist", "errors", "gguf"},
    "quant": {"spec", "dist", "errors", "weights", "gguf"},
    "quantize": {"models", "spec", "quant", "weights", "hub", "errors"},
    "state": {"spec", "errors"},
    "attention": {"spec", "state", "errors"},
    "lora": {"dist", "errors", "weights"},
    "vision": {"spec", "errors"},
    "nn": {"spec", "models", "attention", "quant", "lora", "state", "vision", "weights", "dist", "device", "errors"},
    "engine": {"nn", "lora", "state", "dist", "device", "underway", "errors"},
    "rpc": {"engine", "errors"},
    "config": {"errors"},
    "cli": {"rpc", "engine", "nn", "models", "spec", "config", "errors", "hub", "inspect", "dist", "device", "quantize"},
}
# Packages from outside that a room may not touch: text stays out of the shard's core, tensors out of its descriptions.
NO_TORCH = {"spec", "models", "errors", "hub", "inspect", "config", "gguf"}
TENSOR_PACKAGES = {"torch", "numpy", "safetensors", "kvrun_kernels", "grpclib", "google"}

# Rooms that take tensors as they lie.
DEVICELESS = {"nn", "models", "spec", "lora", "quant", "weights"}

RUST_MAY_USE = {
    "kvrun-proto": set(),
    "kvrun-scheduler": set(),
    "kvrun-text": set(),
    "kvrun-fake-shard": {"kvrun-proto"},
    "kvrun-router": {"kvrun-proto", "kvrun-scheduler", "kvrun-text"},
    "kvrun-launcher": set(),
    "kvrun-benchmark": set(),
    "kvrun-dist": {"kvrun-launcher", "kvrun-router", "kvrun-benchmark"},
}

SOURCE_LINES, TEST_LINES = 400, 600


def tracked(*patterns: str) -> list[Path]:
    """The hand-written files under version control that match, present on disk."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def modules() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if "pb" not in p.relative_to(PACKAGE).parts]


def room(path: Path) -> str:
    """The top-level name within the package that a file belongs to: `nn/linear.py` is in `nn`."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every dotted name a file imports, wherever in the file it does so, relative ones made absolute."""
    package = ["kvrun", *path.relative_to(PACKAGE).parts[:-1]] if path.is_relative_to(PACKAGE) else []
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {stem} | {f"{stem}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_what_its_arrow_allows(path):
    here = room(path)
    if here in ("__init__", "__main__"):
        return
    assert here in MAY_IMPORT, f"{here} is a new room: add its row to MAY_IMPORT and its arrow to ARCHITECTURE.md"
    seen = {name.split(".")[1] for name in imports(path) if name.startswith("kvrun.")}
    known = {p.stem if p.suffix else p.name for p in PACKAGE.iterdir()}
    forbidden = (seen & known) - MAY_IMPORT[here] - {here}
    assert not forbidden, f"{path.relative_to(ROOT)} imports kvrun.{{{', '.join(sorted(forbidden))}}}, which {here} may not know"


@pytest.mark.parametrize("path", [p for p in modules() if room(p) in NO_TORCH], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_descriptions_and_the_command_line_import_no_tensors(path):
    heavy = {name.split(".")[0] for name in imports(path)} & TENSOR_PACKAGES
    assert not heavy, f"{path.relative_to(ROOT)} imports {sorted(heavy)}: it must stay importable without them"


@pytest.mark.parametrize("path", [p for p in modules() if room(p) == "spec"], ids=lambda p: p.name)
def test_the_vocabulary_of_parts_is_standard_library_only(path):
    outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"kvrun"}
    assert not outside, f"{path.name} imports {sorted(outside)}"


def test_the_kernels_know_torch_and_nothing_of_the_server():
    for path in (ROOT / "kernels" / "kvrun_kernels").rglob("*.py"):
        names = {name.split(".")[0] for name in imports(path)}
        assert "kvrun" not in names, f"{path.relative_to(ROOT)} imports the server"


@pytest.mark.parametrize("path", [p for p in modules() if room(p) == "models"], ids=lambda p: p.name)
def test_a_model_file_says_nothing_of_ranks_types_devices_bits_or_adapters(path):
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not names & {"rank", "world", "dtype", "device", "bits", "adapter", "quantize"}


def test_nothing_under_nn_names_a_model():
    families = {p.stem for p in (PACKAGE / "models").glob("*.py")} - {"__init__"}
    for path in (PACKAGE / "nn").rglob("*.py"):
        code = {
            node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        named = {name for name in families if any(name == text for text in code)}
        assert not named, f"{path.relative_to(ROOT)} names {sorted(named)}"


@pytest.mark.parametrize("path", [p for p in modules() if room(p) in DEVICELESS], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_computes_never_asks_on_which_device(path):
    tree = ast.parse(path.read_text())
    asked = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & {"is_cpu", "is_cuda", "cuda", "get_device"}
    asked |= {".device.type" for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node).endswith("device.type")}
    named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)} & {"cuda", "cuda:0"}
    assert not asked | named, f"{path.relative_to(ROOT)} uses {sorted(asked | named)}; what a device decides is decided in device.py"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_config_reads_the_environment(path):
    if room(path) in ("config", "hub"):  # hub hands the hub library's own variables through
        return
    source = path.read_text()
    assert not re.search(r"os\.(environ|getenv)", source), f"{path.relative_to(ROOT)} reads the environment; do it in config.py"


def test_rust_crates_share_no_code_but_the_wire():
    for manifest in tracked("**/Cargo.toml"):
        text = manifest.read_text()
        name = re.search(r'^name = "(kvrun-[a-z-]+)"', text, re.M)
        if not name:
            continue
        body = text.split("[dev-dependencies]")[0].split("[dependencies]")[-1]
        used = set(re.findall(r"^(kvrun-[a-z-]+)", body, re.M))
        assert used <= RUST_MAY_USE[name[1]], f"{name[1]} depends on {sorted(used - RUST_MAY_USE[name[1]])}"


def test_only_args_read_flags_and_the_environment_in_rust():
    for path in tracked(
        "launcher/src/*.rs", "router/src/**/*.rs", "router/scheduler/src/*.rs", "router/text/src/*.rs", "benchmark/src/*.rs"
    ):
        if path.name in ("args.rs", "machine.rs") or "args" in path.parts:
            continue
        code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("//"))
        code = code.split("#[cfg(test)]")[0]
        found = re.search(r"env::(var|var_os|vars|vars_os|set_var)\b", code)
        assert not found, f"{path.relative_to(ROOT)} uses {found and found[0]}"


def test_the_scheduler_is_pure():
    body = (ROOT / "router/scheduler/Cargo.toml").read_text().split("[dev-dependencies]")[0]
    assert not re.search(r"^(tokio|futures|tonic|metrics|tracing|rand)", body, re.M)
    for path in tracked("router/scheduler/src/*.rs"):
        code = path.read_text().split("#[cfg(test)]")[0]
        for forbidden in ("Instant::now", "SystemTime::now", "std::fs", "std::net", "std::thread", "std::env"):
            assert forbidden not in code, f"{path.name} uses {forbidden}"


def test_no_source_file_outgrows_its_page():
    long = []
    for path in tracked("*.py", "*.rs", "*.cpp", "*.h"):
        relative = path.relative_to(ROOT)
        is_test = "tests" in relative.parts or path.name.startswith("test_")
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > (TEST_LINES if is_test else SOURCE_LINES):
            long.append(f"{relative}: {lines}")
    assert not long, "split these by concept: " + ", ".join(long)


def test_no_file_is_named_for_nothing():
    vague = [p for p in tracked("*.py", "*.rs", "*.cpp") if re.search(r"(^|_)(utils?|helpers?|misc|managers?|common)(_|$)", p.stem)]
    assert not vague, f"name these for what they hold: {[str(p.relative_to(ROOT)) for p in vague]}"


def test_no_registry_host_is_written_into_the_tree():
    hosts = re.compile(
        "|".join(["files." + "pythonhosted", "pypi" + r"\.org", "index." + "crates", "static." + "crates", "registry." + "npmjs"])
    )
    found = [
        str(p.relative_to(ROOT))
        for p in tracked("*.txt", "*.toml", "*.md", "*.lock", "*.json", "*.sh", "Makefile", "*.py")
        if hosts.search(p.read_text(errors="ignore"))
    ]
    assert not found, f"registry hosts in {found}"
