"""How byte-level vocabularies cut text before they merge, by the names that `tokenizer.ggml.pre` has for it.

The patterns are those of the published tokenizers that each name was made for.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CAPITAL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CJK = r"[一-龥぀-ゟ゠-ヿ]+"
MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"

BYTES: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2: Json = {**BYTES, "use_regex": True}  # the pattern of GPT-2 is built in
DIGITS: Json = {"type": "Digits", "individual_digits": True}
NFC: Json = {"type": "NFC"}


def split(pattern: str) -> Json:
    """Every match is a piece, and so is what lies between."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def cased(end: str = "") -> str:
    """Words whose capitals come first, before an ending."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return f"{lead}{CAPITAL}*{SMALL}+{end}|{lead}{CAPITAL}+{SMALL}*{end}"


LLAMA3 = [split(rf"{ENDINGS}|{WORDS}|\p{{N}}{{1,3}}|{REST}"), BYTES]
QWEN2 = [split(rf"{ENDINGS}|{WORDS}|\p{{N}}|{REST}"), BYTES]
GPT4O = [split(rf"{cased(ENDINGS + '?')}|\p{{N}}{{1,3}}|{CASED_REST}"), BYTES]
TEKKEN = [split(rf"{cased()}|\p{{N}}|{CASED_REST}"), BYTES]
DEEPSEEK3 = rf"{MARKS}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"
DEEPSEEK = [
    split(r"[\r\n]"),
    split(rf"\s?{CASED}+"),
    split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
    split(r"\s+$"),
    split(r"[一-龥ࠀ-一가-퟿]+"),
    DIGITS,
    BYTES,
]
DEEPSEEK_CODER = [split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(r"[一-龥ࠀ-一가-퟿]+"), DIGITS, BYTES]
FALCON = [
    {"type": "Punctuation", "behavior": "Contiguous"},
    GPT2,
    {"type": "Digits", "individual_digits": False},
    split("[0-9][0-9][0-9]"),
]
BLOOM = [split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), BYTES]

# name -> the steps, and the normalizer of the vocabularies that have one
SPLITS: dict[str, tuple[list[Json], Json | None]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "jais", "exaone4", "trillion", "granite-docling"), ([GPT2], None)),
    **dict.fromkeys(("mpt", "olmo"), ([GPT2], NFC)),
    **dict.fromkeys(("starcoder", "refact", "smollm", "codeshell", "minerva-7b"), ([DIGITS, GPT2], None)),
    **dict.fromkeys(("command-r", "exaone"), ([DIGITS, GPT2], NFC)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe"), (LLAMA3, None)),
    **dict.fromkeys(("chatglm-bpe", "glm4"), (LLAMA3, None)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "hunyuan"), (QWEN2, NFC)),
    "stablelm2": (QWEN2, None),
    "tekken": (TEKKEN, None),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), (GPT4O, None)),
    "deepseek-llm": (DEEPSEEK, None),
    "deepseek-coder": (DEEPSEEK_CODER, None),
    "deepseek-v3": ([split(r"\p{N}{1,3}"), split(CJK), split(DEEPSEEK3), BYTES], None),
    "falcon": (FALCON, None),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), (BLOOM, None)),
}
# Whole words that are tokens are taken before anything is merged.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2", "tekken", "glm4")
# What the first files, which do not say, were made from.
UNSAID = {"llama": "llama-bpe", "qwen2": "qwen2", "qwen2moe": "qwen2", "falcon": "falcon", "starcoder2": "starcoder"}
UNSAID |= {"command-r": "command-r", "bloom": "bloom", "mpt": "mpt", "gptneox": "olmo", "stablelm": "olmo"}
