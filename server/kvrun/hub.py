"""Downloads a repository from the hub: `text-generation-server download-weights`.

The hub library does the work (cache, resume, tokens); what lives here is which files are wanted, whether they fit on the
disk, and what to tell a person when something is in the way. Never fetches pickles or code.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kvrun.errors import FilesError, KvrunError
from kvrun.gguf import PART, is_gguf, prepared

WEIGHTS = ".safetensors"
BLOCKS = ".gguf"
WANTED = (WEIGHTS, ".json", ".jinja", ".model", ".tiktoken", "merges.txt", "vocab.txt")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
SPARE = 1.05  # of the download's size must be free: a full disk harms more than this server
OLD_TOKENS = ("HF_API_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")
Log = Callable[[str], None]


@dataclass(frozen=True)
class Hub:
    """Where and as whom to download, from the environment."""

    cache: Path | None  # None: the library's own place
    weights: Path | None  # a folder an operator filled beforehand
    token: str | None  # None: HF_TOKEN or the library's own login
    offline: bool
    derived: Path  # where folders that are made from files on this disk lie

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Hub:
        """The variables that users of the hub library and of text-generation-inference know."""

        def folder(*names: str) -> Path | None:
            return next((Path(environ[name]).expanduser() for name in names if environ.get(name)), None)

        old = next((environ[name] for name in OLD_TOKENS if environ.get(name)), None)
        return cls(
            cache=folder("HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"),
            weights=folder("WEIGHTS_CACHE_OVERRIDE"),
            token=environ.get("HF_TOKEN") or old,
            offline=environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"),
            derived=(folder("XDG_CACHE_HOME") or (folder("HOME") or Path(tempfile.gettempdir())) / ".cache") / "kvrun" / "gguf",
        )


def local(path: Path, environ: Mapping[str, str] | None = None) -> Path:
    """The model folder for a path on this disk: the path, or what is made of a GGUF file there. Raises FilesError or Unsupported."""
    return prepared(path, Hub.from_environment(os.environ if environ is None else environ).derived) if is_gguf(path) else path


def download(hub: Hub, repository: str, revision: str | None, log: Log) -> Path:
    """The folder of a repository's snapshot, complete, or one of its GGUF files. FilesError says in one paragraph what is in the way.

    `repository` may end in a colon and what tells one GGUF file of it from the others: "owner/name:Q4_K_M".
    """
    repository, _, chosen = repository.partition(":")
    if hub.weights is not None and (hub.weights / "config.json").is_file():
        log(f"{repository} is taken from {hub.weights} (WEIGHTS_CACHE_OVERRIDE)")
        return hub.weights
    if hub.offline:
        return _cached(hub, repository, revision, chosen, "HF_HUB_OFFLINE is set")
    from huggingface_hub import HfApi, constants, snapshot_download, utils

    cache = hub.cache or Path(constants.HF_HUB_CACHE)
    try:
        found = HfApi(token=hub.token).model_info(repository, revision=revision, files_metadata=True)
        names = wanted(repository, (sibling.rfilename for sibling in found.siblings or ()), chosen)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in found.siblings or ()}
        _check_disk(repository, missing_bytes(cache, repository, found.sha, {name: sizes[name] for name in names}), cache)
        log(f"{repository}: {len(names)} files, {amount(sum(sizes[name] for name in names))}, into {cache}")
        folder = snapshot_download(repository, revision=found.sha or revision, cache_dir=hub.cache, token=hub.token, allow_patterns=names)
    except utils.GatedRepoError as error:
        raise FilesError(_gated(hub, repository)) from error
    except utils.RevisionNotFoundError as error:
        raise FilesError(
            f"{repository} has no revision {revision!r}; see its branches and tags at {constants.ENDPOINT}/{repository}/tree/main"
        ) from error
    except utils.RepositoryNotFoundError as error:
        raise FilesError(_unknown(hub, repository, cache)) from error
    except KvrunError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FilesError(f"the disk of {cache} became full while {repository} was downloaded; free space and start again") from error
        return _cached(hub, repository, revision, chosen, f"the hub cannot be reached ({type(error).__name__}: {first_line(error)})")
    return Path(folder) / names[0] if names[0].endswith(BLOCKS) else Path(folder)


def wanted(repository: str, names: Iterable[str], chosen: str = "") -> list[str]:
    """The files to fetch of those a repository has: its safetensors, or one GGUF model. FilesError when there is neither."""
    names = list(names)
    blocks = sorted(name for name in names if name.endswith(BLOCKS))
    if chosen or (blocks and not any(name.endswith(WEIGHTS) for name in names)):
        return _one_model(repository, blocks, chosen)
    # Files of other folders are other formats; `consolidated` files hold the same weights a second time.
    top = [name for name in names if "/" not in name and not name.startswith("consolidated")]
    fetched = sorted(name for name in top if name.endswith(WANTED))
    if any(name.endswith(WEIGHTS) for name in fetched):
        return fetched
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        raise FilesError(
            f"{repository} has its weights only as pickles ({', '.join(pickled[:3])}), which can run code when read and are never read "
            "here; look for a revision with safetensors (many have one under refs/pr), or convert it with transformers' "
            "`save_pretrained` and serve the folder"
        )
    raise FilesError(f"{repository} has no *.safetensors among its {len(names)} files; it is no model or adapter that can be served")


def _one_model(repository: str, names: list[str], chosen: str) -> list[str]:
    """The parts of the only GGUF model, or of the one whose name has `chosen` in it."""
    models: dict[str, list[str]] = {}
    for name in names:
        models.setdefault(PART.sub("", name), []).append(name)
    # An encoder of images is no model of its own.
    fit = [model for model in models if chosen.lower() in model.lower() and (chosen or "mmproj" not in model.lower())]
    exact = [model for model in fit if models[model][0] == chosen]
    if len(exact or fit) == 1:
        return models[(exact or fit)[0]]
    found = ", ".join(models[model][0] for model in (fit or list(models))[:30]) or "none"
    asked = f"with {chosen!r} in its name" if chosen else "that is the only one"
    raise FilesError(f"{repository} has no GGUF file {asked}: found {found}; name one by a part of its name, as in {repository}:Q4_K_M")


def missing_bytes(cache: Path, repository: str, commit: str | None, sizes: Mapping[str, int]) -> int:
    """Bytes of the files that this snapshot does not have in the cache yet."""
    snapshot = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / (commit or "")
    return sum(size for name, size in sizes.items() if commit is None or not (snapshot / name).exists())


def amount(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to a readable length."""
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]


def _check_disk(repository: str, needed: int, cache: Path) -> None:
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed * SPARE > free:
        raise FilesError(
            f"{repository} needs {amount(needed * SPARE)} on the disk of {cache}, {amount(free)} are free; free space there, or name "
            "another disk with --huggingface-hub-cache or HF_HOME"
        )


def _cached(hub: Hub, repository: str, revision: str | None, chosen: str, why: str) -> Path:
    """The snapshot that an earlier download left, if it is whole, or its GGUF file."""
    from huggingface_hub import constants, snapshot_download

    cache = hub.cache or Path(constants.HF_HUB_CACHE)
    try:
        folder = Path(snapshot_download(repository, revision=revision, cache_dir=hub.cache, local_files_only=True))
    except Exception as error:
        at = f" at revision {revision}" if revision else ""
        raise FilesError(
            f"{why}, and {repository}{at} is not in the cache {cache}; download it where the hub can be reached, or name a folder"
        ) from error
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    if not any(name.endswith((WEIGHTS, BLOCKS)) for name in names):
        raise FilesError(f"{why}, and the cached {repository} in {folder} is incomplete; finish its download where the hub can be reached")
    first = wanted(repository, names, chosen)[0]
    return folder / first if first.endswith(BLOCKS) else folder


def _gated(hub: Hub, repository: str) -> str:
    from huggingface_hub import constants, get_token

    page = f"{constants.ENDPOINT}/{repository}"
    if hub.token or get_token():
        return f"{repository} is gated and the account of your token has no access yet; ask for it at {page}, then start again"
    return f"{repository} is gated; accept its terms at {page}, then set HF_TOKEN to a token of that account"


def _unknown(hub: Hub, repository: str, cache: Path) -> str:
    from huggingface_hub import HfApi

    names = [path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*")]
    with contextlib.suppress(Exception):  # a hint is no reason to fail
        names += [model.id for model in HfApi(token=hub.token).list_models(search=repository.split("/")[-1], limit=20)]
    near = get_close_matches(repository, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "check its spelling"
    token = "the token of HF_TOKEN may not see it" if hub.token else "a private repository needs HF_TOKEN"
    return f"there is no repository {repository} on the hub, or it is private: {hint} ({token}); a folder goes by its path, as in ./model"


def main(argv: list[str], environ: Mapping[str, str] | None = None) -> int:
    """`download-weights REPO [--revision R] [--json]`: the model's folder on standard output, all else on standard error."""
    parser = argparse.ArgumentParser(prog="text-generation-server download-weights", description="Download a repository from the hub.")
    parser.add_argument("repository", metavar="REPO", help="a repository, owner/name:Q4_K_M for one of its GGUF files, or a path")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--json", action="store_true", help="the folder in a JSON object")
    args = parser.parse_args(argv)

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        folder, known = Path(args.repository), os.environ if environ is None else environ
        is_file = folder.suffix == BLOCKS and ":" not in args.repository
        if not folder.is_dir() and not is_file:
            folder = download(Hub.from_environment(known), args.repository, args.revision, log)
        folder = local(folder, known)
    except KvrunError as error:
        log(str(error))
        return error.exit_code
    answer: Any = {"repository": args.repository, "folder": str(folder)}
    print(json.dumps(answer) if args.json else folder)
    return 0
