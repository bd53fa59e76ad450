"""minimind-mcore download data|weights|tokenizer|reward-model NAME: get published files through the hubs' own clients.

    minimind-mcore download data pretrain_t2t_mini
    HF_ENDPOINT=https://hf-mirror.com minimind-mcore download weights minimind-3 --hub hf
    minimind-mcore download --list

A download that was cut continues where it ended. Files with a published digest are compared with it.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

from minimind_mcore.cli.settings import env
from minimind_mcore.errors import UserError
from minimind_mcore.paths import default_outputs
from minimind_mcore.pipeline.tables import KINDS, Entry, find, tables
from minimind_mcore.storage import disk_errors, free_bytes, sha256

logger = logging.getLogger(__name__)

CLIENTS = {"modelscope": "modelscope", "hf": "huggingface_hub"}  # hub: its client's package
MARGIN = 1.1  # a client keeps a little next to the file


def main(argv: Sequence[str]) -> None:
    """Download what a command line names."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="minimind-mcore download", description=__doc__, formatter_class=raw)
    parser.add_argument("kind", nargs="?", choices=KINDS)
    parser.add_argument("name", nargs="?", help="a name of --list")
    parser.add_argument(
        "--hub", choices=("auto", *CLIENTS), default="auto", help="auto: the first whose client is here"
    )
    parser.add_argument("--output", type=Path, help="directory (default: DATA_DIR or dataset; hf/NAME for models)")
    parser.add_argument("--list", action="store_true", help="print all names")
    args = parser.parse_args(argv)
    if args.list or not args.kind or not args.name:
        print(listing())
        if not args.list:
            raise UserError("give a kind and a name of this list")
        return
    entry = find(args.kind, args.name)
    hub = choose(args.hub)
    folder = args.output or default_folder(args.kind, args.name)
    require_space(folder, entry, args.name)
    logger.info(f"{args.name} from {repository_of(entry, hub)} on {hub}, licence {entry['licence']}")
    fetch(hub, entry, folder, args.kind == "data")
    verify(folder, entry)
    logger.info(f"done: {folder}")


def listing() -> str:
    """Return all names with size and licence."""
    rows = [(kind, name, entry) for kind in KINDS for name, entry in tables()[kind].items()]
    return "\n".join(f"{kind:<13}{name:<23}{entry['gb']:7.3f} GB  {entry['licence']}" for kind, name, entry in rows)


def default_folder(kind: str, name: str) -> Path:
    """Return where a download goes."""
    data = Path(env("DATA_DIR", str(default_outputs() / "dataset"))).absolute()
    return {"data": data, "tokenizer": data / "tokenizer"}.get(kind, default_outputs() / "hf" / name)


def choose(hub: str) -> str:
    """Return the hub to use. HF_ENDPOINT asks for Hugging Face.

    Raises:
        UserError: its client is not installed.
    """
    here = [name for name, package in CLIENTS.items() if importlib.util.find_spec(package)]
    if hub == "auto" and here:
        return "hf" if "hf" in here and env("HF_ENDPOINT") else here[0]
    if hub not in here:
        package = CLIENTS.get(hub, "modelscope")
        raise UserError(f"--hub {hub}: {package} is not installed; run pip install 'minimind-mcore[download]'")
    return hub


def require_space(folder: Path, entry: Entry, name: str) -> None:
    """Refuse a download that the disk has no room for.

    Raises:
        UserError: see above.
    """
    there = sum((folder / file).stat().st_size for file in entry.get("files", []) if (folder / file).is_file())
    needed, free = entry["gb"] * 1e9 * MARGIN - there, free_bytes(folder)
    if needed > free:
        raise UserError(
            f"{name} needs {needed / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free; free some space"
        )


def repository_of(entry: Entry, hub: str) -> str:
    """Return the name of an entry's repository on a hub."""
    return entry["modelscope"] if hub == "modelscope" else entry["hf"]


def fetch(hub: str, entry: Entry, folder: Path, is_data: bool) -> None:
    """Download an entry through a hub's client.

    Raises:
        UserError: the file or the hub cannot be reached, or the disk is full.
    """
    download = _modelscope if hub == "modelscope" else _hugging_face
    folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder):
        try:
            download(repository_of(entry, hub), entry.get("files"), folder, is_data)
        except Exception as error:
            raise _explained(error, repository_of(entry, hub), hub) from error


def _hugging_face(repository: str, files: list[str] | None, folder: Path, is_data: bool) -> None:
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url

    kind = "dataset" if is_data else "model"
    for file in files or HfApi().list_repo_files(repository, repo_type=kind):
        hf_hub_download(repository, file, repo_type=kind, local_dir=folder)
        # The hub gives the SHA-256 of a large file as its ETag. The client compares sizes alone.
        etag = get_hf_file_metadata(hf_hub_url(repository, file, repo_type=kind)).etag or ""
        if len(etag) == 64:
            require_digest(folder / file, etag)


def _modelscope(repository: str, files: list[str] | None, folder: Path, is_data: bool) -> None:
    from modelscope.hub.snapshot_download import dataset_snapshot_download, snapshot_download

    # The client compares each file with the SHA-256 of the hub's list.
    get = dataset_snapshot_download if is_data else snapshot_download
    get(repository, local_dir=str(folder), allow_patterns=files)
    if missing := [file for file in files or () if not (folder / file).is_file()]:
        raise UserError(
            f"{repository}: modelscope has no {', '.join(missing)}; minimind-mcore download --list has the names"
        )


def verify(folder: Path, entry: Entry) -> None:
    """Compare files with the digests of the table.

    Raises:
        UserError: a file differs. It is removed, so that the same command downloads it again.
    """
    for file, expected in entry.get("sha256", {}).items():
        require_digest(folder / file, expected)


def require_digest(file: Path, expected: str) -> None:
    """Compare a file with its published SHA-256.

    Raises:
        UserError: it differs. The file is removed, so that the same command downloads it again.
    """
    if (found := sha256(file)) != expected:
        file.unlink()
        raise UserError(
            f"{file}: its SHA-256 is {found}, published is {expected}; it was removed: run the same command again"
        )


def _explained(error: Exception, what: str, hub: str) -> Exception:
    """Return the error of a client as one that a user understands; errors of the disk as they are."""
    if isinstance(error, UserError) or getattr(error, "errno", None):
        return error
    endpoint = env("HF_ENDPOINT", "huggingface.co") if hub == "hf" else env("MODELSCOPE_ENDPOINT", "www.modelscope.cn")
    text = " ".join(str(error).split())[:300]
    advice = "what was received is kept; run the same command again, or try --hub or a mirror in HF_ENDPOINT"
    if "404" in text:
        advice = "minimind-mcore download --list has the names"
    return UserError(f"{what}: {hub} ({endpoint}) did not give it: {type(error).__name__}: {text}; {advice}")
