"""Every architecture answers with an adapter on every linear, its embedding and its head as peft answers."""

import json

import pytest
import torch
from adapters import edit_config, peft_logits, write_adapter
from safetensors.torch import load_file, save_file
from test_parity import NATIVE, prompts
from tiny import CLOSE, ROWS, distance

ASKED = prompts(seed=3, lengths=(1, 7, 20))
ADAPTER = {"r": 4, "lora_alpha": 2, "target_modules": "everything"}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("row", [row for row in ROWS if ROWS[row].published is None])
def test_logits_with_an_adapter_on_everything_equal_peft_s(row, world, groups, checkpoint, tmp_path):
    folder, asked = checkpoint(row), ASKED
    write_adapter(tmp_path, folder, **ADAPTER)
    runner = groups[world]
    runner.load(folder)
    runner.adapt(tmp_path, [0, 1, 2])
    # The same prompts with and without the adapter, side by side in one batch.
    logits = runner.step([row for n, ids in enumerate(asked) for row in ((n, ids), (100 + n, ids))])
    pieces = logits.split([len(ids) for ids in asked for _ in range(2)])
    adapted, plain = torch.cat(pieces[::2]), torch.cat(pieces[1::2])
    expected = torch.cat(peft_logits(folder, tmp_path, asked))
    print(f"{row}, world {world}: {distance(adapted, expected):.1e} of the logits' standard deviation")
    assert distance(adapted, expected) < CLOSE
    alone = runner.step([(200 + n, ids) for n, ids in enumerate(asked)])
    # Without native code the two differ by rounding.
    assert torch.equal(plain, alone) if NATIVE else distance(plain, alone) < CLOSE
    assert distance(adapted, plain) > 0.1, "the adapter changes too little to prove anything"


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("row", [row for row in ROWS if ROWS[row].published is not None])
def test_logits_with_an_adapter_equal_those_of_the_weights_it_would_make(row, world, groups, checkpoint, tmp_path):
    folder, asked = checkpoint(row), ASKED
    runner = groups[world]
    runner.load(folder)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    adapter.mkdir()
    merged.mkdir()
    _write_both(folder, runner._runner.model.linears, adapter, merged)
    runner.adapt(adapter, [0, 1, 2])
    adapted = runner.step(list(enumerate(asked)))
    runner.load(merged)
    assert distance(adapted, runner.step(list(enumerate(asked)))) < CLOSE


def _write_both(folder, linears, adapter, merged):
    """An adapter for every linear of a model, by our own names for them, and the model with its products added in."""
    generator = torch.Generator().manual_seed(0)
    tensors, pairs = load_file(folder / "model.safetensors"), {}
    for source in (source for linear in linears for source in linear.sources):
        if f"{source.module}.weight" not in tensors:
            continue  # a tied head
        a = torch.randn(4, source.in_features, generator=generator) * 0.3
        b = torch.randn(source.out_features, 4, generator=generator) * 0.3
        pairs[f"base_model.model.{source.module}.lora_A.weight"], pairs[f"base_model.model.{source.module}.lora_B.weight"] = a, b
        product, weight = b @ a / 2, tensors[f"{source.module}.weight"]
        if source.module != "lm_head":  # which is scaled to unit rows before an adapter is added
            tensors[f"{source.module}.weight"] = weight + (product if product.shape == weight.shape and not _flipped(folder) else product.T)
    pairs = {name: tensor for name, tensor in pairs.items() if "lm_head" not in name}
    save_file(pairs, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, merged / "model.safetensors")
    (merged / "config.json").write_text((folder / "config.json").read_text())


def _flipped(folder):
    """Whether the checkpoint stores its matrices [in, out]."""
    return json.loads((folder / "config.json").read_text()).get("model_type") == "gpt2"


def test_a_head_or_embedding_other_than_the_base_s_is_refused(groups, checkpoint, tmp_path):
    folder = checkpoint("llama")
    write_adapter(tmp_path, folder, r=4, lora_alpha=6, target_modules=["lm_head", "embed_tokens"])
    runner = groups[1]
    runner.load(folder)
    runner.adapt(tmp_path, [0])
    path = tmp_path / "adapter_model.safetensors"
    saved = load_file(path)
    copies = [name for name in saved if name.endswith("base_layer.weight")]
    assert len(copies) == 2, "peft saves both whole"
    for name in copies:
        save_file({**saved, name: saved[name] + 1}, path)
        with pytest.raises(Exception, match=f"{name} is not the base model's"):
            runner.adapt(tmp_path, [0])
    save_file(saved, path)
    edit_config(tmp_path, r=5)
    with pytest.raises(Exception, match="wrong shape"):
        runner.adapt(tmp_path, [0])
