"""What the files beside config.json say: how images are prepared, and which ids special tokens have."""

from __future__ import annotations

from pathlib import Path

from kvrun.errors import ConfigError
from kvrun.spec.config import Config, json_object
from kvrun.spec.vision import Pixels

PREPROCESSOR, PROCESSOR, TOKENIZER = "preprocessor_config.json", "processor_config.json", "tokenizer.json"


def image_processor(c: Config) -> Config:
    """The settings by which images are prepared: a file of their own, or in newer folders a part of the processor's."""
    folder = _folder(c)
    alone, joint = folder / PREPROCESSOR, folder / PROCESSOR
    if alone.is_file():
        return Config(json_object(alone), str(alone), folder=folder)
    if joint.is_file():
        return Config(json_object(joint), str(joint), folder=folder).within("image_processor")
    raise ConfigError(f"{folder} holds neither {PREPROCESSOR} nor {PROCESSOR}, which say how images are prepared; download one of them")


def pixels(processor: Config, mean: tuple[float, ...], std: tuple[float, ...], filter: int) -> Pixels:
    """What becomes of a picture's bytes by these settings; the rest of the arguments are what their class says by itself."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        processor.only(step, True)
    return Pixels(
        processor.get("resample", filter),
        tuple(map(float, processor.get("image_mean", mean))),
        tuple(map(float, processor.get("image_std", std))),
        float(processor.get("rescale_factor", 1 / 255)),
    )


def special_tokens(c: Config) -> dict[str, int]:
    """Text and id of every token that tokenizer.json sets apart."""
    path = _folder(c) / TOKENIZER
    added = json_object(path).get("added_tokens") or []
    try:
        return {token["content"]: int(token["id"]) for token in added}
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: added_tokens is not a list of tokens: {error!r}; save the tokenizer again") from error


def token_id(c: Config, tokens: dict[str, int], text: str) -> int:
    """The id of a special token. Raises ConfigError."""
    if text not in tokens:
        raise ConfigError(f"{c.where} describes a model that marks images with {text}, which is no special token of {TOKENIZER}")
    return tokens[text]


def token_text(c: Config, tokens: dict[str, int], token: int) -> str:
    """The text of a special token. Raises ConfigError."""
    for text, known in tokens.items():
        if known == token:
            return text
    raise ConfigError(f"{c.where} marks images with token {token}, which is no special token of {TOKENIZER}")


def begins_words(c: Config) -> bool:
    """Whether the tokenizer itself puts a space before every text between special tokens."""
    normalizer = json_object(_folder(c) / TOKENIZER).get("normalizer") or {}
    return any(step.get("type") == "Prepend" for step in (normalizer, *normalizer.get("normalizers", ())))


def _folder(c: Config) -> Path:
    if c.folder is None:
        raise ConfigError(f"{c.where} was read without its folder, whose other files say how images are prepared")
    return c.folder
