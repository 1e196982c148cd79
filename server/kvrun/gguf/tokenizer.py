"""The tokenizer.json and tokenizer_config.json that a GGUF file's metadata stand for."""

from __future__ import annotations

import json
from typing import Any

from kvrun.errors import FilesError, Unsupported
from kvrun.gguf.container import Container
from kvrun.gguf.splits import SPLITS, UNSAID, WHOLE_WORDS, Json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # types of tokens
SPACE = "▁"
# Phi 3 was trained with special tokens that take the blanks after them, but for these; no file says so.
STRIPPED, UNSTRIPPED = ("phi3", "llama"), ("<unk>", "<s>", "<|endoftext|>")
UNTRAINED = ("default", "")  # names of a split that say nothing


class Vocabulary:
    """The tokens of a file, and what it says of them."""

    def __init__(self, container: Container) -> None:
        self._metadata, self.file = container.metadata, container.file
        self.architecture = container.architecture
        self.model = str(self.get("model", ""))
        self.tokens: list[str] = self.get("tokens") or []
        if not self.tokens:
            raise FilesError(f"{container.file} holds no tokens; name a file that was made with its vocabulary")
        self.types: list[int] = self.get("token_type") or [NORMAL] * len(self.tokens)
        while self.types and self.types[-1] == UNUSED:  # what pads the matrix is no token
            self.tokens, self.types = self.tokens[:-1], self.types[:-1]

    def get(self, key: str, default: Any = None) -> Any:
        """A field of `tokenizer.ggml`."""
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def special(self, name: str) -> str | None:
        """The text of the special token of a name, "bos"."""
        id = self.get(f"{name}_token_id")
        return self.tokens[id] if id is not None and id < len(self.tokens) else None

    @property
    def ids(self) -> dict[str, int]:
        """Text -> id, the first where a text comes twice."""
        found: dict[str, int] = {}
        for id, token in enumerate(self.tokens):
            found.setdefault(token, id)
        return found

    @property
    def added(self) -> list[Json]:
        """Tokens that are found in a text before it is cut: those that control, and those that a person defined."""
        named = {self.special(name) for name in ("bos", "eos", "eot", "eom", "padding")}
        strips = (self.architecture, self.model) == STRIPPED
        plain = {"single_word": False, "lstrip": False, "normalized": False}
        return [
            {"id": id, "content": token, **plain, "rstrip": strips and token not in UNSTRIPPED, "special": self.types[id] != USER_DEFINED}
            for token, id in self.ids.items()
            if self.types[id] in (CONTROL, UNKNOWN, USER_DEFINED) or token in named
        ]

    def adds(self, name: str) -> bool:
        """Whether a text begins with the token "bos", or ends with "eos"."""
        stated = self.get(f"add_{name}_token")
        if stated is not None:
            return bool(stated)
        return name == "bos" and (self.model == "llama" or self.get("pre") in ("llama-bpe", "llama3", "llama-v3", "tekken", "falcon3"))

    @property
    def chat_template(self) -> str | list[dict[str, str]] | None:
        """The template of conversations, with its name where there are several."""
        first, names = self._metadata.get("tokenizer.chat_template"), self._metadata.get("tokenizer.chat_templates")
        if not names:
            return first
        named = {name: self._metadata.get(f"tokenizer.chat_template.{name}") for name in names}
        return [{"name": name, "template": text} for name, text in {"default": first, **named}.items() if text]


def tokenizer_of(container: Container) -> tuple[Json, Json]:
    """The contents of tokenizer.json and tokenizer_config.json. Unsupported names a kind of vocabulary that is not read."""
    vocabulary = Vocabulary(container)
    written = container.metadata.get("tokenizer.huggingface.json")
    return json.loads(written) if written else _tokenizer(vocabulary), _config(vocabulary)


def _tokenizer(v: Vocabulary) -> Json:
    kinds = {"gpt2": _byte_level, "llama": _sentence_piece}
    if v.model not in kinds:
        raise Unsupported(
            f"{v.file}: vocabularies of the kind {v.model or 'unnamed'} are not read, read are {' and '.join(kinds)}; "
            "serve the original checkpoint instead"
        )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": v.added,
        "post_processor": _around(v),
        **kinds[v.model](v),
    }


def _config(v: Vocabulary) -> Json:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config: Json = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {field: text for field, name in names.items() if (text := v.special(name)) is not None}
    config |= {f"add_{name}_token": v.adds(name) for name in ("bos", "eos")}
    return config if v.chat_template is None else {**config, "chat_template": v.chat_template}


def _around(v: Vocabulary) -> Json | None:
    """What puts special tokens around a text."""
    there = {name: text for name in ("bos", "eos") if v.adds(name) and (text := v.special(name)) is not None}
    if not there:
        return None
    ids = v.ids

    def template(*sequences: str) -> list[Json]:
        steps: list[Json] = []
        for type_id, sequence in enumerate(sequences):
            before, after = ([{"SpecialToken": {"id": there[n], "type_id": type_id}}] if n in there else [] for n in ("bos", "eos"))
            steps += [*before, {"Sequence": {"id": sequence, "type_id": type_id}}, *after]
        return steps

    special = {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in there.values()}
    return {"type": "TemplateProcessing", "single": template("A"), "pair": template("A", "B"), "special_tokens": special}


def _bpe(v: Vocabulary, merges: list[Any], **settings: Any) -> Json:
    plain: Json = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    plain |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **plain, **settings, "vocab": v.ids, "merges": merges}


def _byte_level(v: Vocabulary) -> Json:
    """Bytes as characters, cut by a pattern, merged by a list."""
    name = v.get("pre") or ""
    if name in UNTRAINED:
        name = UNSAID.get(v.architecture, "gpt-2")
    if name not in SPLITS:
        raise Unsupported(
            f"{v.file}: texts that are cut as {name} has it are not read, read are {', '.join(sorted(SPLITS))}; "
            "serve the original checkpoint instead"
        )
    steps, normalizer = SPLITS[name]
    merges = v.get("merges", [])
    if not merges and any(len(token) > 1 and kind == NORMAL for token, kind in zip(v.tokens, v.types, strict=True)):
        raise FilesError(f"{v.file}: its metadata lack tokenizer.ggml.merges; convert the model again with a current llama.cpp")
    # Each is two texts between which lies a space, which no byte is written as.
    pairs = [merge.split(" ", 1) for merge in merges]
    ids = v.ids
    known = [[a, b] for a, b in pairs if a in ids and b in ids and a + b in ids]
    return {
        "normalizer": normalizer,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(v, known, ignore_merges=name in WHOLE_WORDS),
    }


def _sentence_piece(v: Vocabulary) -> Json:
    """Characters merged in the order of scores, bytes where there is no piece for a character."""
    prefix = v.get("add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    unknown = v.special("unknown") or next((v.tokens[id] for id, kind in enumerate(v.types) if kind == UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]},
        "model": _bpe(v, _merges(v), unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


def _merges(v: Vocabulary) -> list[list[str]]:
    """Every way to make a piece of two others, best scores first."""
    ids, scores = v.ids, v.get("scores")
    if scores is None:
        raise FilesError(f"{v.file}: its metadata lack tokenizer.ggml.scores; convert the model again with a current llama.cpp")
    found: list[tuple[float, int, int, list[str]]] = []
    for piece, id in ids.items():
        if v.types[id] != NORMAL:
            continue
        for place in range(1, len(piece)):
            left, right = piece[:place], piece[place:]
            if left in ids and right in ids:
                found.append((-scores[id], ids[left], ids[right], [left, right]))
    return [pair for *_, pair in sorted(found, key=lambda merge: merge[:3])]
