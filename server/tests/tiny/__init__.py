"""Tiny random checkpoints with tokenizers, one row per shape of architecture, made offline by transformers.

A family's rows lie in a file of its own beside this one. Small default weights make a tied model repeat one token for
ever, so a greedy test would see nothing: `randomise` draws weights large enough that answers vary.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import torch

from tiny.row import CLOSE as CLOSE
from tiny.row import TIE as TIE
from tiny.row import VOCABULARY as VOCABULARY
from tiny.row import Row

SPECIALS = ("<pad>", "<s>", "</s>")
ROWS: dict[str, Row] = {
    name: row for family in iter_modules(__path__) for name, row in getattr(import_module(f"tiny.{family.name}"), "ROWS", {}).items()
}
_written: dict[Path, Row] = {}


def write_checkpoint(
    row: str,
    folder: Path,
    edit: Callable[[dict], dict] = lambda config: config,
    seed: int | None = None,
    settled: bool = True,
    **save: object,
) -> Path:
    """Write the row's weights, config and tokenizer into a folder; `edit` rewrites the saved config, `save` goes to save_pretrained.

    Where a published checkpoint is laid out otherwise than transformers saves it, transformers' own lies in `oracle/` there.
    """
    from safetensors.torch import load_file, save_file
    from transformers import CONFIG_MAPPING

    asked, folder = ROWS[row] if seed is None else replace(ROWS[row], seed=seed), Path(folder)
    torch.manual_seed(0)  # for what `randomise` adds to in place of drawing it
    model = auto(asked).from_config(CONFIG_MAPPING[asked.kind](**asked.config), dtype=torch.float32)
    randomise(model, asked.seed)
    asked.adjust(model)
    if settled:
        asked.settle(model)
    model.save_pretrained(folder, **save)
    if asked.published is not None:
        model.save_pretrained(folder / "oracle")
        config, tensors = asked.published(json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"))
        (folder / "config.json").write_text(json.dumps(config))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    write_tokenizer(folder, asked.specials)
    asked.prepare(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    _written[folder] = asked
    return folder


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw embeddings from N(0, 0.02), matrices from N(0, 6 / sqrt(inputs)), and move every vector by N(0, 0.2)."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 or name.endswith(".A_log"):  # its exponential is a rate of decay
                parameter += 0.2 * noise
            else:
                parameter.copy_(noise * (0.02 if id(parameter) in embeddings else 6 / parameter.shape[-1] ** 0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer += 0.2 * torch.randn(buffer.shape, generator=generator)


def auto(row: Row) -> type:
    """transformers' class that makes models of a row."""
    import transformers

    return getattr(transformers, row.auto)


def write_tokenizer(folder: Path, specials: tuple[str, ...] = ()) -> None:
    """A byte-level tokenizer without merges: any text comes back exactly, and every id is below 259, further specials from there."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIALS, *specials)])
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))


def oracle_model(folder: Path) -> torch.nn.Module:
    """transformers' model of a tiny checkpoint in float32, with the attention that computes the truth."""
    folder = Path(folder)
    own = folder / "oracle" if (folder / "oracle").is_dir() else folder
    row = row_of(folder)
    return auto(row).from_pretrained(own, attn_implementation=row.attention, dtype=torch.float32).eval()


def row_of(folder: Path) -> Row:
    """The row that a folder was written for."""
    return _written.get(Path(folder), Row("", {}))


def oracle(folder: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """transformers' logits in float32 for each prompt alone, [tokens, vocabulary]."""
    model, logits = oracle_model(folder), row_of(folder).logits
    with torch.inference_mode():
        return [logits(model, torch.tensor([ids]))[0] for ids in prompts]


def distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference of two tensors, in standard deviations of the second."""
    return ((logits - reference).abs().max() / reference.std()).item()


def behind(logits: torch.Tensor, answer: list[int], barred: tuple[int, ...] = ()) -> float:
    """How far below the likeliest token an answer's lies at the worst place, in standard deviations; 0 = the greedy answer.

    logits [tokens, vocabulary], of which those before the answer's last tell its tokens · barred: ids that none may be
    """
    scores = logits[-len(answer) - 1 : -1]
    ids = torch.arange(scores.shape[1])
    likeliest = scores.masked_fill(torch.isin(ids, torch.tensor(barred, dtype=ids.dtype)), float("-inf")).amax(-1)
    return ((likeliest - scores.gather(1, torch.tensor(answer)[:, None])[:, 0]).max() / scores.std()).item()
