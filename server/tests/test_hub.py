"""Downloads, over a stand-in for the hub library: what is fetched, what is refused, and what a person is told."""

import errno
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants, utils
from kvrun import hub
from kvrun.errors import FilesError

REPOSITORY = "org/model"
LLAMA = {
    "config.json": 100,
    "model-00001-of-00002.safetensors": 1000,
    "model-00002-of-00002.safetensors": 1000,
    "model.safetensors.index.json": 50,
    "tokenizer.json": 10,
    "chat_template.jinja": 5,
    "README.md": 7,
    ".gitattributes": 7,
    "pytorch_model.bin": 4000,
    "modeling_llama.py": 9,
    "consolidated.safetensors": 2000,
    "onnx/model.json": 3,
}
TAKEN = [
    "chat_template.jinja",
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
]


def refusal(kind: type, status: int = 404) -> Exception:
    return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid/api")))


class StandIn:
    """The calls of the hub library that a download makes, answered from fields."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = dict(LLAMA)
        self.info_error: Exception | None = None
        self.fetch_error: Exception | None = None
        self.cached: Path | None = None
        self.known: list[str] = []
        self.fetched: list[dict] = []
        self.tokens: list[object] = []

    def api(self, token: str | None = None) -> SimpleNamespace:
        self.tokens.append(token)
        return SimpleNamespace(model_info=self.model_info, list_models=self.list_models)

    def list_models(self, search: str, limit: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(id=name) for name in self.known if search.lower() in name.lower()]

    def model_info(self, repository: str, revision: str | None, files_metadata: bool) -> SimpleNamespace:
        if self.info_error:
            raise self.info_error
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in self.files.items()]
        return SimpleNamespace(sha="c0ffee", siblings=siblings)

    def snapshot_download(self, repository: str, **options) -> str:
        if options.get("local_files_only"):
            if self.cached is None:
                raise utils.LocalEntryNotFoundError("nothing there")
            return str(self.cached)
        self.fetched.append(options)
        if self.fetch_error:
            raise self.fetch_error
        return str(self.folder)


@pytest.fixture
def stand(monkeypatch, tmp_path) -> StandIn:
    stand = StandIn(tmp_path / "snapshot")
    stand.folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "HfApi", stand.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return stand


def run(capsys, *words: str, **environ: str) -> tuple[int, str, str]:
    code = hub.main(list(words) or [REPOSITORY], environ)
    out, err = capsys.readouterr()
    return code, out.strip(), err


def refused(capsys, *words: str, **environ: str) -> str:
    """The message of a download that ends with 11, which is one paragraph."""
    code, out, err = run(capsys, *words, **environ)
    assert (code, out) == (11, "")
    message = err.strip().splitlines()[-1]
    assert len(message) > 40
    return message


def test_a_download_prints_its_folder(stand, capsys):
    code, out, err = run(capsys)
    assert (code, out) == (0, str(stand.folder))
    assert "6 files" in err


def test_the_folder_in_json(stand, capsys):
    _, out, _ = run(capsys, REPOSITORY, "--json")
    assert f'"folder": "{stand.folder}"' in out


def test_only_weights_configs_and_tokenizers_are_fetched(stand, capsys):
    run(capsys)
    assert stand.fetched[0]["allow_patterns"] == TAKEN
    assert stand.fetched[0]["revision"] == "c0ffee"


def test_an_adapter_s_files_are_fetched(stand, capsys):
    stand.files = {"adapter_config.json": 1, "adapter_model.safetensors": 2, "training_args.bin": 3}
    assert run(capsys)[0] == 0
    assert stand.fetched[0]["allow_patterns"] == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_model_with_only_pickles_is_refused_with_what_to_do(stand, capsys):
    stand.files = {"config.json": 1, "pytorch_model.bin": 2}
    message = refused(capsys)
    assert "pytorch_model.bin" in message and "save_pretrained" in message
    assert not stand.fetched


def test_a_repository_without_weights_is_refused(stand, capsys):
    stand.files = {"README.md": 1}
    assert "no *.safetensors" in refused(capsys)


def test_a_gated_repository_names_its_page_and_the_token(stand, capsys):
    stand.info_error = refusal(utils.GatedRepoError, 403)
    assert "accept its terms" in refused(capsys) and REPOSITORY in refused(capsys)
    assert "has no access yet" in refused(capsys, HF_TOKEN="hf_secret")
    assert "hf_secret" not in refused(capsys, HF_TOKEN="hf_secret")


def test_a_misnamed_repository_gets_the_nearest_names(stand, capsys):
    stand.info_error = refusal(utils.RepositoryNotFoundError)
    stand.known = ["org/model-7b", "elsewhere/unlike"]
    assert "did you mean org/model-7b?" in refused(capsys)
    stand.known = []
    (Path(constants.HF_HUB_CACHE) / "models--org--modell").mkdir(parents=True)
    assert "did you mean org/modell?" in refused(capsys)


def test_an_unknown_repository_without_neighbours_says_how_to_go_on(stand, capsys):
    stand.info_error = refusal(utils.RepositoryNotFoundError, 401)
    message = refused(capsys)
    assert "check its spelling" in message and "HF_TOKEN" in message


def test_an_unknown_revision_is_named(stand, capsys):
    stand.info_error = refusal(utils.RevisionNotFoundError)
    assert "'v9'" in refused(capsys, REPOSITORY, "--revision", "v9")


@pytest.mark.parametrize("error", [httpx.ConnectError("name not known"), TimeoutError("slow"), ConnectionResetError("gone")])
def test_a_hub_that_cannot_be_reached_is_no_obstacle_to_what_is_cached(stand, capsys, error):
    stand.info_error = error
    assert "cannot be reached" in refused(capsys)
    stand.cached = stand.folder
    (stand.folder / "model.safetensors").touch()
    assert run(capsys)[:2] == (0, str(stand.folder))


def test_offline_uses_the_cache_and_asks_nobody(stand, capsys):
    assert "HF_HUB_OFFLINE is set" in refused(capsys, HF_HUB_OFFLINE="1")
    stand.cached = stand.folder
    assert "incomplete" in refused(capsys, HF_HUB_OFFLINE="1")
    (stand.folder / "model.safetensors").touch()
    assert run(capsys, HF_HUB_OFFLINE="yes")[:2] == (0, str(stand.folder))
    assert not stand.tokens


def test_a_disk_too_small_is_found_before_the_download(stand, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10_000, 8_000, 2_000))
    message = refused(capsys)
    assert "2.2 KiB" in message and "2.0 KiB are free" in message
    assert not stand.fetched


def test_files_that_are_there_need_no_room(stand, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10_000, 8_000, 2_000))
    snapshot = Path(constants.HF_HUB_CACHE) / "models--org--model" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "model-00001-of-00002.safetensors").touch()
    assert run(capsys)[0] == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_meanwhile_is_named(stand, capsys, number):
    stand.fetch_error = OSError(number, "no space")
    assert "became full" in refused(capsys)


def test_caches_and_tokens_of_every_name_are_used(stand, capsys, tmp_path):
    for name in ("HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"):
        run(capsys, **{name: str(tmp_path / name)})
        assert stand.fetched[-1]["cache_dir"] == tmp_path / name
    for name in ("HF_TOKEN", "HF_API_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        run(capsys, **{name: f"secret {name}"})
        assert stand.fetched[-1]["token"] == f"secret {name}"


def test_weights_that_an_operator_put_there_are_taken(stand, capsys, tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    assert run(capsys, WEIGHTS_CACHE_OVERRIDE=str(weights))[1] == str(stand.folder)
    (weights / "config.json").touch()
    assert run(capsys, WEIGHTS_CACHE_OVERRIDE=str(weights))[1] == str(weights)


def test_a_folder_is_its_own_answer(stand, capsys, tmp_path):
    assert run(capsys, str(tmp_path))[:2] == (0, str(tmp_path))
    assert not stand.fetched


BLOCKS = {
    "README.md": 7,
    "m-Q4_K_M.gguf": 400,
    "m-Q8_0.gguf": 800,
    "mmproj-f16.gguf": 90,
    "big/m-F16-00001-of-00002.gguf": 900,
    "big/m-F16-00002-of-00002.gguf": 700,
}


@pytest.fixture
def unread(monkeypatch):
    """GGUF files are not read here: a file is its own model folder."""
    monkeypatch.setattr(hub, "prepared", lambda path, cache: path)


@pytest.mark.parametrize(
    ("asked", "fetched"),
    [
        ("q4_k_m", ["m-Q4_K_M.gguf"]),
        ("Q8_0", ["m-Q8_0.gguf"]),
        ("m-Q8_0.gguf", ["m-Q8_0.gguf"]),
        ("m-F16", ["big/m-F16-00001-of-00002.gguf", "big/m-F16-00002-of-00002.gguf"]),
        ("mmproj", ["mmproj-f16.gguf"]),
    ],
)
def test_one_gguf_file_of_several_is_fetched_by_a_part_of_its_name(asked, fetched, stand, unread, capsys):
    stand.files = BLOCKS
    code, out, _ = run(capsys, f"{REPOSITORY}:{asked}")
    assert (code, out) == (0, str(stand.folder / fetched[0]))
    assert stand.fetched[0]["allow_patterns"] == fetched


def test_the_only_gguf_file_needs_no_name_and_several_are_listed(stand, unread, capsys):
    stand.files = {name: BLOCKS[name] for name in ("README.md", "m-Q8_0.gguf", "mmproj-f16.gguf")}
    assert run(capsys)[1] == str(stand.folder / "m-Q8_0.gguf")
    stand.files = BLOCKS
    message = refused(capsys)
    assert "found big/m-F16-00001-of-00002.gguf, m-Q4_K_M.gguf, m-Q8_0.gguf; name one" in message and f"{REPOSITORY}:Q4_K_M" in message
    assert "with 'Q2_K' in its name: found" in refused(capsys, f"{REPOSITORY}:Q2_K")


def test_safetensors_are_taken_where_both_are_there(stand, unread, capsys):
    stand.files = {**LLAMA, **BLOCKS}
    run(capsys)
    assert stand.fetched[0]["allow_patterns"] == TAKEN


def test_a_cached_gguf_file_is_found_without_the_hub(stand, unread, capsys):
    stand.cached = stand.folder
    (stand.folder / "m-Q8_0.gguf").touch()
    assert run(capsys, HF_HUB_OFFLINE="1")[:2] == (0, str(stand.folder / "m-Q8_0.gguf"))


def test_a_gguf_file_that_is_not_there_is_not_looked_for_on_the_hub(stand, capsys):
    assert "nowhere.gguf is not there; name a GGUF file" in refused(capsys, "nowhere.gguf")
    assert not stand.fetched


def test_the_library_is_imported_only_for_a_download():
    import subprocess

    code = "import sys; import kvrun.hub; print('huggingface_hub' in sys.modules)"
    root = Path(hub.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_errors_name_themselves():
    with pytest.raises(FilesError, match="org/x"):
        hub.wanted("org/x", [])
