"""The vocabulary of parts: values that compare, fold and print."""

import subprocess
import sys

import pytest
from kvrun.spec import (
    Config,
    Embed,
    Layer,
    Mlp,
    Parallel,
    Residual,
    RmsNorm,
    architecture,
    describe,
    fuse,
    linear,
    packed,
    stack,
    transposed,
)
from kvrun.spec.model import Decoder, Head, Model

NORM = RmsNorm("norm", 1e-6)
MLP = Mlp(8, "relu", linear("up"), linear("down"))


def model(layers) -> Model:
    return Model(Decoder(Embed("embed", 10, 4), layers, Head(NORM, "head", tied=True)), positions=16)


def test_equal_parts_are_equal_values():
    assert Residual(NORM, MLP) == Residual(RmsNorm("norm", 1e-6), Mlp(8, "relu", linear("up"), linear("down")))
    assert Residual(NORM, MLP) != Residual(NORM, MLP, MLP)
    assert hash(Parallel(Residual(NORM, MLP))) == hash(Parallel(Residual(NORM, MLP)))


def test_stack_names_its_layers_and_may_vary_them():
    alike = stack(2, "h.{i}", [Residual(NORM, MLP)])
    assert [layer.at for layer in alike] == ["h.0", "h.1"]
    varied = stack(3, "h.{i}", lambda i: [Residual(NORM, MLP)] * i)
    assert [len(layer.steps) for layer in varied] == [0, 1, 2]


def test_layouts_say_how_a_linear_is_stored():
    assert linear("a") == fuse("a")
    assert fuse("a", "b", bias=True).names == ("a", "b")
    assert transposed(packed("a", "per_group")).order == "per_group"
    assert transposed(linear("a", bias=True)) != linear("a", bias=True)


def test_describe_folds_equal_layers_and_leaves_out_defaults():
    layers = (*stack(2, "h.{i}", [Residual(NORM, MLP)]), Layer("h.2", (Parallel(Residual(NORM), Residual(NORM, MLP)),)))
    assert describe(model(layers)) == (
        "positions 16\n"
        "embed Embed name=embed vocabulary=10 hidden=4\n"
        "layers 0 to 1 at h.0\n"
        "  Residual\n"
        "    norm RmsNorm name=norm eps=1e-06\n"
        "    Mlp width=8 act=relu\n"
        "      up Fused names=up\n"
        "      down Fused names=down\n"
        "layer 2 at h.2\n"
        "  Parallel\n"
        "    Residual\n"
        "      norm RmsNorm name=norm eps=1e-06\n"
        "    Residual\n"
        "      norm RmsNorm name=norm eps=1e-06\n"
        "      Mlp width=8 act=relu\n"
        "        up Fused names=up\n"
        "        down Fused names=down\n"
        "head Head name=head tied=True\n"
        "  norm RmsNorm name=norm eps=1e-06\n"
    )


def test_an_architecture_is_described_once():
    with pytest.raises(ValueError, match="LlamaForCausalLM is described twice"):
        import kvrun.models  # noqa: F401

        architecture("LlamaForCausalLM")(lambda c: model(()))


def test_describing_a_model_imports_no_tensors():
    code = "import sys, kvrun.models; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'safetensors')))"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode == 0


def test_a_config_can_be_copied():
    import copy

    assert copy.copy(Config({"a": 1})).fields == {"a": 1}
