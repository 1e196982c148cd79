"""A file's vocabulary cuts texts as the tokenizer that it was made from does, and as transformers' reading of the file does."""

import json
from pathlib import Path

import pytest
from blocks import served, write_gguf
from kvrun.errors import FilesError, Unsupported
from kvrun.gguf import prepared
from kvrun.gguf.splits import SPLITS
from tiny import SPECIALS, write_checkpoint
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.tokenization_utils_base import generate_merges

TEXTS = [
    "Once upon a time, there was a fox.", "It's JOHN'S; we'll've done, THEY'RE I'D", "  two spaces   three\t\ttabs \n\n lines\r\n end  ",
    "1234567890 12 3.14159 1,000,000 x2y3", "日本語のテキスト、中文。한국어 ไทย", "naïve café Ünïcödé ﬁ e\u0301",
    "🦊👩\u200d👩\u200d👧 mixed🦊text", "snake_case camelCase HTTPServer", "def f(x):\n    return x  # comment\n", "a", "", " ",
    "<s>in</s> <think>text</think><|turn|>\n", "!!! ... ??? -- «quoted» “curly” $5 + <= >= ^~|`",
    "Пример русского текста. Ελληνικά", "\u00a0nbsp\u2003em\u200bzero",
]  # fmt: skip
CORPUS = [text * 3 for text in TEXTS] + [Path(__file__).read_text(), (Path(__file__).parent / "blocks.py").read_text()] * 2
CONTROL, DEFINED = [*SPECIALS, "<|turn|>"], ["<think>", "</think>"]


def split(pattern: str) -> list:
    """Matches as pieces, then bytes."""
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


GPT2, DIGITS = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(individual_digits=True)
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# name in a file -> the steps of the published tokenizers that it was made for, and whether they compose characters first
PUBLISHED = {
    "gpt-2": ([GPT2], False),
    "starcoder": ([DIGITS, GPT2], False),
    "command-r": ([DIGITS, GPT2], True),
    "llama-bpe": (split(CL100K % "{1,3}"), False),
    "qwen2": (split(CL100K % ""), True),
    "falcon": (
        [
            pre_tokenizers.Punctuation("contiguous"),
            GPT2,
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ],
        False,
    ),
}
READ_BY_TRANSFORMERS = ("gpt-2", "llama-bpe", "tekken", "gpt-4o")  # the rest it cuts as GPT-2, or composes no characters


def byte_level(steps: list, composed: bool, *, bos: bool = False) -> Tokenizer:
    """A trained vocabulary of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.normalizer = normalizers.NFC() if composed else None
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=CONTROL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return finished(tokenizer, bos)


def pieces(prefix: bool) -> Tokenizer:
    """A trained vocabulary of characters, with bytes where it has none, as SentencePiece makes them."""
    before = [normalizers.Prepend("▁")] if prefix else []
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # pieces do not span words
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], limit_alphabet=80, show_progress=False)
    trained.train_from_iterator([text for text in CORPUS if "<0x" not in text], trainer)
    stated = json.loads(trained.to_str())["model"]
    learned = [token for token, _ in sorted(stated["vocab"].items(), key=lambda item: item[1]) if token not in ("<unk>", *CONTROL)]
    tokens = ["<unk>", *CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    ids = {token: i for i, token in enumerate(tokens)}
    # SentencePiece merges any two neighbours that make a piece, not only those that were merged when it was learned.
    merges = generate_merges(ids, {token: -float(i) for token, i in ids.items()})
    model = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = trained.normalizer
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    return finished(tokenizer, bos=True)


def finished(tokenizer: Tokenizer, bos: bool) -> Tokenizer:
    """With its special tokens, one before every text if `bos`."""
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in DEFINED])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def filed(checkpoint, tmp_path):
    """A tokenizer and what its file says of it -> the file and its model folder."""

    def make(tokenizer: Tokenizer, **said: object) -> tuple[Path, Path]:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
            (folder / name).symlink_to(checkpoint / name)
        tokenizer.save(str(folder / "tokenizer.json"))
        write_gguf(folder, tmp_path / "model.gguf", **{f"tokenizer.{key}": value for key, value in said.items()})
        return tmp_path / "model.gguf", prepared(tmp_path / "model.gguf", tmp_path / "cache")

    return make


def scores(tokenizer: Tokenizer) -> list[float]:
    """What SentencePiece gives the pieces of a vocabulary: the later learned, the lower."""
    return [-float(id) for id in range(tokenizer.get_vocab_size())]


def same(found: Tokenizer, wanted: Tokenizer) -> None:
    for text in TEXTS:
        ids = wanted.encode(text).ids
        assert found.encode(text).ids == ids, text
        assert found.encode(text, add_special_tokens=False).ids == wanted.encode(text, add_special_tokens=False).ids
        for skip in (True, False):
            assert found.decode(ids, skip_special_tokens=skip) == wanted.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_are_cut_and_merged_as_the_published_tokenizer_has_it(name, filed):
    wanted = byte_level(*PUBLISHED[name], bos=name == "llama-bpe")
    _, folder = filed(wanted, **{"ggml.pre": name})
    same(Tokenizer.from_file(str(folder / "tokenizer.json")), wanted)


def by_transformers(file: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_bytes_are_cut_as_transformers_cuts_them_with_the_same_file(name, filed):
    file, folder = filed(byte_level([GPT2], False), **{"ggml.pre": name, "ggml.add_bos_token": False})
    found, wanted = Tokenizer.from_file(str(folder / "tokenizer.json")), by_transformers(file)
    for text in TEXTS:
        assert found.encode(text, add_special_tokens=False).ids == wanted.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_are_merged_in_the_order_of_their_scores(prefix, filed):
    wanted = pieces(prefix)
    _, folder = filed(wanted, **{"ggml.scores": scores(wanted), "ggml.add_space_prefix": prefix})
    same(Tokenizer.from_file(str(folder / "tokenizer.json")), wanted)


def test_pieces_are_merged_as_transformers_merges_them_with_the_same_file(filed):
    made = pieces(True)
    file, folder = filed(made, **{"ggml.scores": scores(made)})
    found, wanted = Tokenizer.from_file(str(folder / "tokenizer.json")), by_transformers(file)
    for text in TEXTS:
        if not text.startswith(" ") and "<" not in text:  # there it leaves out the first of several spaces
            assert found.encode(text, add_special_tokens=False).ids == wanted.encode(text, add_special_tokens=False).ids, text


def test_special_tokens_of_phi_3_take_the_blanks_after_them(tmp_path):
    checkpoint, made = write_checkpoint("phi3", tmp_path / "phi3"), pieces(True)
    made.save(str(checkpoint / "tokenizer.json"))
    folder = served(checkpoint, tmp_path, **{"tokenizer.ggml.scores": scores(made)})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    assert ids("a<|turn|>\n b") == ids("a<|turn|>b") and ids("a<s>\n b") != ids("a<s>b")


@pytest.mark.parametrize("name", SPLITS)
def test_every_way_to_cut_keeps_every_byte(name, filed):
    _, folder = filed(byte_level([GPT2], False), **{"ggml.pre": name, "ggml.add_bos_token": False})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    composed = SPLITS[name][1] is not None
    for text in TEXTS:
        wanted = normalizers.NFC().normalize_str(text) if composed else text
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == wanted


@pytest.mark.parametrize(
    ("said", "around"),
    [
        ({}, (0, 0)),
        ({"ggml.add_bos_token": True}, (1, 0)),
        ({"ggml.add_bos_token": True, "ggml.add_eos_token": True}, (1, 1)),
        ({"ggml.pre": "llama-bpe"}, (1, 0)),
        ({"ggml.pre": "llama-bpe", "ggml.add_bos_token": False}, (0, 0)),
    ],
)
def test_special_tokens_are_put_around_a_text_as_the_file_says(said, around, filed):
    _, folder = filed(byte_level([GPT2], False), **said)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    before, after = around
    bare = tokenizer.encode("text", add_special_tokens=False).ids
    assert tokenizer.encode("text").ids == [1] * before + bare + [2] * after
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["add_bos_token"]) == ("<s>", "</s>", bool(before))


def test_chat_templates_are_those_of_the_file(filed):
    named = {"chat_template": "{{ messages }}", "chat_templates": ["tool_use"], "chat_template.tool_use": "{{ tools }}"}
    _, folder = filed(byte_level([GPT2], False), **named)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["chat_template"] == [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ tools }}"}]


def test_one_chat_template_is_a_text(filed):
    _, folder = filed(byte_level([GPT2], False), chat_template="{{ messages }}")
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"


def test_answers_end_with_every_token_that_ends_a_turn(checkpoint, tmp_path):
    tokens = [*json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"], "<|im_end|>", "<|eot_id|>", "<|end|>"]
    kinds = [3, 3, 3, *[1] * 256, 3, 5, 4]
    said = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.eot_token_id": 0}
    folder = served(checkpoint, tmp_path, **said)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == [0, 2, 259, 261]


def test_a_tokenizer_that_the_file_carries_whole_is_taken(filed):
    wanted = byte_level([GPT2], False)
    _, folder = filed(wanted, **{"huggingface.json": wanted.to_str(), "ggml.pre": "mystery"})
    assert json.loads((folder / "tokenizer.json").read_text()) == json.loads(wanted.to_str())


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ({"ggml.model": "rwkv"}, Unsupported, "vocabularies of the kind rwkv are not read, read are gpt2 and llama"),
        ({"ggml.pre": "mystery"}, Unsupported, "texts that are cut as mystery has it are not read, read are bloom, .*command-r"),
        ({"ggml.merges": []}, FilesError, r"lack tokenizer\.ggml\.merges; convert the model again"),
        ({"ggml.model": "llama"}, FilesError, r"lack tokenizer\.ggml\.scores; convert the model again"),
    ],
)
def test_vocabularies_that_are_not_read_are_refused_by_name(said, error, message, filed):
    with pytest.raises(error, match=message):
        filed(byte_level([GPT2], False), **said)
