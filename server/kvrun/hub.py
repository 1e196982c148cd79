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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kvrun.errors import FilesError, KvrunError

WEIGHTS = ".safetensors"
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
        )


def download(hub: Hub, repository: str, revision: str | None, log: Log) -> Path:
    """The folder of a repository's snapshot, complete. FilesError says in one paragraph what is in the way."""
    if hub.weights is not None and (hub.weights / "config.json").is_file():
        log(f"{repository} is taken from {hub.weights} (WEIGHTS_CACHE_OVERRIDE)")
        return hub.weights
    if hub.offline:
        return _cached(hub, repository, revision, "HF_HUB_OFFLINE is set")
    from huggingface_hub import HfApi, constants, snapshot_download, utils

    cache = hub.cache or Path(constants.HF_HUB_CACHE)
    try:
        found = HfApi(token=hub.token).model_info(repository, revision=revision, files_metadata=True)
        names = wanted(repository, (sibling.rfilename for sibling in found.siblings or ()))
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
        return _cached(hub, repository, revision, f"the hub cannot be reached ({type(error).__name__}: {first_line(error)})")
    return Path(folder)


def wanted(repository: str, names: Iterable[str]) -> list[str]:
    """The files to fetch of those a repository has. FilesError when there are no safetensors among them."""
    names = list(names)
    # Files of other folders are other formats; `consolidated` files hold the same weights a second time.
    top = [name for name in names if "/" not in name and not name.startswith("consolidated")]
    chosen = sorted(name for name in top if name.endswith(WANTED))
    if any(name.endswith(WEIGHTS) for name in chosen):
        return chosen
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        raise FilesError(
            f"{repository} has its weights only as pickles ({', '.join(pickled[:3])}), which can run code when read and are never read "
            "here; look for a revision with safetensors (many have one under refs/pr), or convert it with transformers' "
            "`save_pretrained` and serve the folder"
        )
    raise FilesError(f"{repository} has no *.safetensors among its {len(names)} files; it is no model or adapter that can be served")


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


def _cached(hub: Hub, repository: str, revision: str | None, why: str) -> Path:
    """The snapshot that an earlier download left, if it is whole."""
    from huggingface_hub import constants, snapshot_download

    cache = hub.cache or Path(constants.HF_HUB_CACHE)
    try:
        folder = Path(snapshot_download(repository, revision=revision, cache_dir=hub.cache, local_files_only=True))
    except Exception as error:
        at = f" at revision {revision}" if revision else ""
        raise FilesError(
            f"{why}, and {repository}{at} is not in the cache {cache}; download it where the hub can be reached, or name a folder"
        ) from error
    if not any(folder.glob(f"*{WEIGHTS}")):
        raise FilesError(f"{why}, and the cached {repository} in {folder} is incomplete; finish its download where the hub can be reached")
    return folder


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
    """`download-weights REPO [--revision R] [--json]`: the folder on standard output, all else on standard error."""
    parser = argparse.ArgumentParser(prog="text-generation-server download-weights", description="Download a repository from the hub.")
    parser.add_argument("repository", metavar="REPO")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--json", action="store_true", help="the folder in a JSON object")
    args = parser.parse_args(argv)

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        folder = Path(args.repository)
        if not folder.is_dir():
            folder = download(Hub.from_environment(os.environ if environ is None else environ), args.repository, args.revision, log)
    except KvrunError as error:
        log(str(error))
        return error.exit_code
    answer: Any = {"repository": args.repository, "folder": str(folder)}
    print(json.dumps(answer) if args.json else folder)
    return 0
