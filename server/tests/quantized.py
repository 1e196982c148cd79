"""One small Llama in every weight format, written by the format's own package where it installs, else by its definition.

Beside each lies `oracle/`: the plain float32 model that the quantized one stands for.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import randomise, write_tokenizer
from tiny.row import COMMON

CONFIG = {
    **COMMON, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 192, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
SINGLE = "model.safetensors"
Tensors = dict[str, torch.Tensor]
# Tensors of a weight by suffix, and the weight that they stand for.
Encoded = tuple[Tensors, torch.Tensor]


def write_plain(folder: Path, **changed: object) -> Path:
    """The model that all formats start from, float32, with some fields of CONFIG `changed`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG, **changed}))
    randomise(model)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_quantized(name: str, plain: Path, folder: Path) -> Path:
    """The model in a format of WRITERS."""
    folder.mkdir()
    weights = WRITERS[name](plain, folder)
    write_tokenizer(folder)
    write_oracle(plain, folder, weights)
    return folder


def write_oracle(plain: Path, folder: Path, weights: Tensors) -> None:
    """The plain model with the weights of some modules replaced."""
    shutil.copytree(plain, folder / "oracle")
    tensors = load_file(plain / SINGLE)
    for module, weight in weights.items():
        tensors[f"{module}.weight"] = weight.float().contiguous()
    save_file(tensors, folder / "oracle" / SINGLE, metadata={"format": "pt"})


def linears(tensors: Tensors) -> list[str]:
    """Modules of the layers' linears, experts among them."""
    return [name.removesuffix(".weight") for name in tensors if "_proj." in name or ".experts." in name]


def by_definition(config: dict, encode: Callable[[torch.Tensor], Encoded]) -> Callable[[Path, Path], Tensors]:
    """A writer that replaces each linear's weight by what `encode` makes of it."""

    def write(plain: Path, folder: Path) -> Tensors:
        tensors, weights = load_file(plain / SINGLE), {}
        for module in linears(tensors):
            encoded, weights[module] = encode(tensors.pop(f"{module}.weight"))
            tensors |= {f"{module}.{suffix}": tensor.contiguous() for suffix, tensor in encoded.items()}
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
        stated = json.loads((plain / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**stated, "quantization_config": config}))
        return weights

    return write


def integers(weight: torch.Tensor, bits: int, groups: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[out, in] -> fields [out, in], zeros [out, groups], float16 scales [out, groups], input j in group groups[j]."""
    most, count = (1 << bits) - 1, int(groups.max()) + 1
    low, high = (torch.stack([getattr(weight[:, groups == g], m)(1).values for g in range(count)], 1) for m in ("min", "max"))
    if symmetric:
        scales = (2 * torch.maximum(low.abs(), high.abs()) / most).half()
        zeros = torch.full(scales.shape, (most + 1) // 2)
    else:
        scales = ((high - low) / most).half()
        zeros = (-low / scales.float()).round().clamp(0, most).long()
    fields = (weight / scales[:, groups].float() + zeros[:, groups]).round().clamp(0, most).long()
    return fields, zeros, scales


def pack(fields: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Bits one after another along a dimension, lowest first, in integers of 32."""
    fields = fields.movedim(dim, 0).long()
    out = torch.zeros((len(fields) * bits // 32, *fields.shape[1:]), dtype=torch.long)
    for k, field in enumerate(fields):
        word, low = divmod(k * bits, 32)
        out[word] |= (field << low) & 0xFFFFFFFF
        if low + bits > 32:
            out[word + 1] |= field >> (32 - low)
    return torch.where(out >= 1 << 31, out - (1 << 32), out).int().movedim(0, dim)


def gptq(bits: int, group: int, *, symmetric: bool, version: int = 1, ordered: bool = False) -> Callable[[Path, Path], Tensors]:
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": ordered, "sym": symmetric}
    config |= {} if version == 1 else {"checkpoint_format": "gptq_v2"}

    def encode(weight: torch.Tensor) -> Encoded:
        inputs = weight.shape[1]
        groups = torch.arange(inputs) // (inputs if group == -1 else group)
        if ordered:
            groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        fields, zeros, scales = integers(weight, bits, groups, symmetric)
        stored = (zeros - (1 if version == 1 else 0)) & ((1 << bits) - 1)
        tensors = {"qweight": pack(fields.T, bits, 0), "qzeros": pack(stored.T, bits, 1), "scales": scales.T, "g_idx": groups.int()}
        return tensors, (fields - zeros[:, groups]) * scales[:, groups].float()

    return by_definition(config, encode)


def awq(group: int, version: str) -> Callable[[Path, Path], Tensors]:
    def encode(weight: torch.Tensor) -> Encoded:
        groups = torch.arange(weight.shape[1]) // group
        fields, zeros, scales = integers(weight, 4, groups, symmetric=False)
        dense = (fields - zeros[:, groups]) * scales[:, groups].float()
        if version == "gemm":
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            woven = [pack(t.T.unflatten(1, (-1, 8))[..., order].flatten(1), 4, 1) for t in (fields, zeros)]
            return {"qweight": woven[0], "qzeros": woven[1], "scales": scales.T}, dense
        short = -zeros.shape[1] % 8
        padded = [torch.nn.functional.pad(t, (0, short)) for t in (zeros, scales)]
        return {"qweight": pack(fields, 4, 1), "qzeros": pack(padded[0], 4, 1), "scales": padded[1]}, dense

    return by_definition({"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": version}, encode)


def fp8(block: tuple[int, int] | None) -> Callable[[Path, Path], Tensors]:
    """With blocks, a scale for each; without, one for the matrix and one for its inputs, which weights do not need."""
    config = {"quant_method": "fp8", "activation_scheme": "dynamic"} | ({"weight_block_size": block} if block else {})

    def encode(weight: torch.Tensor) -> Encoded:
        high, wide = block or weight.shape
        rows, columns = (torch.arange(n) // size for n, size in zip(weight.shape, (high, wide), strict=True))
        scale = torch.zeros(math.ceil(weight.shape[0] / high), math.ceil(weight.shape[1] / wide))
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                scale[i, j] = weight[rows == i][:, columns == j].abs().max() / 448
        codes = (weight / scale[rows][:, columns]).to(torch.float8_e4m3fn)
        dense = codes.float() * scale[rows][:, columns]
        if block:
            return {"weight": codes, "weight_scale_inv": scale}, dense
        return {"weight": codes, "weight_scale": scale.reshape(()), "input_scale": torch.tensor(0.5)}, dense

    return by_definition(config, encode)


def compressed(layout: str, **arguments: object) -> Callable[[Path, Path], Tensors]:
    """Written and read back by compressed-tensors."""

    def write(plain: Path, folder: Path) -> Tensors:
        from compressed_tensors import ModelCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(plain, dtype=torch.float32)
        args = QuantizationArgs(**arguments)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
        config = QuantizationConfig(config_groups={"group_0": scheme}, format=layout, ignore=["lm_head"])
        apply_quantization_config(model, config)
        chosen = [(name, module) for name, module in model.named_modules() if "_proj" in name]
        for _, module in chosen:
            blocks = module.weight.detach().unflatten(1, (-1, args.group_size or module.weight.shape[1]))
            low, high = blocks.amin(2), blocks.amax(2)
            if args.strategy == "tensor":
                low, high = low.min().reshape(1), high.max().reshape(1)
            whole = None
            if args.strategy == "tensor_group":
                whole = module.weight_global_scale.data = generate_gparam(low.min(), high.max())
            scale, zero = calculate_qparams(low, high, args, whole)
            module.weight_scale.data = scale
            if not args.symmetric:
                module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)
        compressor = ModelCompressor.from_pretrained_model(model, quantization_format=layout)
        compressor.compress_model(model)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / SINGLE, metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        compressor.update_config(folder)
        compressor.decompress_model(model)
        return {name: module.weight.detach() for name, module in chosen}

    return write


def bitsandbytes(**arguments: object) -> Callable[[Path, Path], Tensors]:
    """Written by transformers with bitsandbytes, and read back by it."""

    def write(plain: Path, folder: Path) -> Tensors:
        import bitsandbytes.functional as bnb
        from transformers import BitsAndBytesConfig, LlamaForCausalLM

        config = BitsAndBytesConfig(**arguments)
        model = LlamaForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32, device_map="cpu")
        model.save_pretrained(folder)
        chosen = {name: module.weight for name, module in model.named_modules() if "_proj" in name}
        if config.load_in_8bit:
            return {name: bnb.int8_vectorwise_dequant(weight.CB, weight.SCB) for name, weight in chosen.items()}
        return {name: bnb.dequantize_4bit(weight.data, weight.quant_state) for name, weight in chosen.items()}

    return write


GROUPED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
WRITERS: dict[str, Callable[[Path, Path], Tensors]] = {
    "gptq2": gptq(2, 64, symmetric=False),
    "gptq3": gptq(3, 32, symmetric=True),
    "gptq4": gptq(4, 64, symmetric=True),
    "gptq4_asymmetric_v2": gptq(4, 32, symmetric=False, version=2),
    "gptq4_ordered": gptq(4, 64, symmetric=False, ordered=True),
    "gptq4_one_group": gptq(4, -1, symmetric=False),
    "gptq8": gptq(8, 64, symmetric=False),
    "gptq8_ordered": gptq(8, 32, symmetric=True, ordered=True),
    "awq_gemm": awq(64, "gemm"),
    "awq_gemv": awq(32, "gemv"),
    "fp8": fp8(None),
    "fp8_block": fp8((64, 64)),
    "packed4": compressed("pack-quantized", **GROUPED, symmetric=True),
    "packed4_asymmetric": compressed("pack-quantized", **GROUPED, symmetric=False),
    "packed8": compressed("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    "int_quantized": compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    "float_quantized": compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True),
    "float_quantized_tensor": compressed("float-quantized", num_bits=8, type="float", strategy="tensor", symmetric=True),
    "nvfp4": compressed(
        "nvfp4-pack-quantized",
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        symmetric=True,
        scale_dtype=torch.float8_e4m3fn,
        zp_dtype=torch.float8_e4m3fn,
    ),
    "bnb_int8": bitsandbytes(load_in_8bit=True),
    "bnb_nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bnb_nf4_double": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bnb_fp4_double": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
}
