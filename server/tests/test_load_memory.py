"""Loading takes hardly more memory than the model it makes: what is read is gone once it lies where it is multiplied from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantized import CONFIG
from safetensors.torch import save_file

# The largest matrix is a third of the weights, so that whoever holds one beside its packed form is over the bound.
SHAPE = {"hidden_size": 1024, "intermediate_size": 24576, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8}
# Of the weights, held at once while they are loaded. 20 MiB of it are what is being read, which of larger models is a smaller share.
MOST = {"": 1.2, "int8": 1.4, "int4": 1.75}
STATUS = Path("/proc/self/status")

PROGRAM = f"""
import json, sys
from pathlib import Path
from kvrun.nn.build import load_model

def held(key):
    return next(1024 * int(line.split()[1]) for line in Path("{STATUS}").read_text().splitlines() if line.startswith(key))

small, folder, quantize = sys.argv[1], sys.argv[2], sys.argv[3] or None
load_model(small, dtype="bfloat16", quantize=quantize)  # what a process imports and starts once
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = held("VmRSS")
model = load_model(folder, dtype="bfloat16", quantize=quantize)
print(json.dumps([held("VmHWM") - before, held("VmRSS") - before, model.weight_bytes]))
"""


def write(folder: Path, shape: dict[str, int]) -> Path:
    """A Llama in bfloat16 whose numbers nobody looks at."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**CONFIG, **shape}, dtype="bfloat16")
    with torch.device("meta"):
        stated = LlamaForCausalLM(config).state_dict()
    row = torch.linspace(-1, 1, max(shape["intermediate_size"], shape["hidden_size"])).bfloat16()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tensors = {name: row[: tensor.shape[-1]].expand(tensor.shape).clone() for name, tensor in stated.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A model to warm up with, and one of tens of megabytes in any format."""
    return write(tmp_path_factory.mktemp("small"), {**SHAPE, "intermediate_size": 64}), write(tmp_path_factory.mktemp("large"), SHAPE)


@pytest.mark.skipif(not STATUS.exists(), reason="/proc says what memory a process takes: not here")
@pytest.mark.parametrize("quantize", MOST)
def test_the_peak_is_hardly_above_the_weights(quantize, folders):
    said = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, folders), quantize], check=True, capture_output=True, text=True).stdout
    peak, after, weights = json.loads(said)
    assert after > 0.9 * weights, "this test no longer sees the weights"
    assert peak <= MOST[quantize] * weights, f"{peak / weights:.2f} times the weights at the peak, {after / weights:.2f} afterwards"
