"""Writes the Python side of the wire, `kvrun/rpc/pb/`, from `proto/model_shard.proto`: messages, the service that shards are, and for
tests a client of another library. Runs without kvrun being installed."""

import re
import shutil
import sys
from importlib import resources
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "proto" / "model_shard.proto"
TARGET = Path(__file__).resolve().parent / "kvrun" / "rpc" / "pb"


def generate(source: Path = SOURCE, target: Path = TARGET) -> None:
    """Compile the protocol into `target`, replacing what lies there; ends with the compiler's own message if it refuses."""
    from grpc_tools import protoc

    if not source.is_file():
        raise SystemExit(f"the protocol is not at {source}; run this from a checkout of kv.run")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / "__init__.py").write_text('"""Generated from proto/model_shard.proto by generate_proto.py; never edited."""\n')
    includes = [f"-I{source.parent}", f"-I{resources.files('grpc_tools') / '_proto'}"]
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpclib_python", "grpc_python")]
    plugin = Path(sys.executable).with_name("protoc-gen-grpclib_python")
    if protoc.main(["protoc", f"--plugin={plugin.name}={plugin}", *includes, *outputs, source.name]):
        raise SystemExit(f"protoc refused {source}; its message is above")
    for file in target.glob("*.py*"):
        # protoc writes absolute imports of siblings, which only work from inside the generated folder.
        file.write_text(re.sub(r"^import (\w+_pb2)", r"from . import \1", file.read_text(), flags=re.MULTILINE))


if __name__ == "__main__":
    generate(*map(Path, sys.argv[1:]))
