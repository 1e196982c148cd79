"""A GGUF file through the whole tree: nothing beside it is needed, and what cannot be served is said before anything starts."""

import json
import shutil

import pytest
from blocks import all_of, write_gguf
from oracle import surprises
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tree import DEMO, PROMPTS, demo_adapters, launch, running, together

NEW = 48
SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the demo model as one file, and the checkpoint that this stands for."""
    at = tmp_path_factory.mktemp("gguf")
    (at / "file").mkdir()
    chat = json.loads((DEMO / "model" / "tokenizer_config.json").read_text())["chat_template"]
    said = {"tokenizer.chat_template": chat, "tokenizer.ggml.add_bos_token": True}
    stands = write_gguf(DEMO / "model", at / "file" / "demo-Q8_0.gguf", all_of("Q8_0"), **said)
    judge = shutil.copytree(DEMO / "model", at / "judge")
    save_file({name: stands.get(name, tensor) for name, tensor in load_file(judge / SINGLE).items()}, judge / SINGLE)
    return at


def ids_of_all(tree, adapter: str | None) -> list[list[int]]:
    extra = {"adapter_id": adapter} if adapter else {}
    answers = together([lambda p=p: tree.generate(p, max_new_tokens=NEW, **extra) for p in PROMPTS])
    assert not [a.error for a in answers if a.error]
    return [a.ids for a in answers]


@pytest.mark.parametrize(("named", "ranks"), [("demo-Q8_0.gguf", 1), ("", 2)])
def test_a_file_answers_as_transformers_and_peft_over_its_weights(named, ranks, files):
    adapters = demo_adapters()
    name = next(iter(adapters))
    flags = ["--model-id", str(files / "file" / named), "--dtype", "float32", "--num-shard", str(ranks), "--quantize", "gguf"]
    environ = {"XDG_CACHE_HOME": str(files / "cache")}
    with running(*flags, "--lora-ids", f"{name}={adapters[name]}", env=environ) as tree:
        assert len(tree.shards()) == ranks
        assert not surprises(files / "judge", PROMPTS, ids_of_all(tree, None), NEW)
        assert not surprises(files / "judge", PROMPTS, ids_of_all(tree, name), NEW, adapters[name])
        with tree.client() as http:
            assert http.get("/info").json()["model_id"] == str(files / "file" / named)
            said = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Tell me."}], "max_tokens": 4}).json()
    tokenizer = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    prompt = "<s><|user|>Tell me.<|assistant|>"
    assert said["usage"]["prompt_tokens"] == len(tokenizer.encode(prompt, add_special_tokens=False).ids)


def refused(*flags: str, files) -> tuple[int, str]:
    tree = launch(*flags, env={"XDG_CACHE_HOME": str(files / "cache")})
    code = tree.process.wait(60)
    return code, "\n".join(tree.log)


def test_a_folder_with_several_files_lists_them(files, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).symlink_to(files / "file" / "demo-Q8_0.gguf")
    code, log = refused("--model-id", str(tmp_path), files=files)
    assert code == 11 and "holds 2 GGUF models: a.gguf, b.gguf; name one of them" in log


def test_another_format_than_the_file_s_is_refused(files):
    code, log = refused("--model-id", str(files / "file"), "--quantize", "int8", files=files)
    assert code == 10 and "--quantize int8 was asked for and the checkpoint is quantized with gguf; leave the flag out" in log
