"""minimind-mcore download data|weights|tokenizer|reward-model NAME: download published files with the hub's client.

    minimind-mcore download data pretrain_t2t_mini
    HF_ENDPOINT=https://hf-mirror.com minimind-mcore download weights minimind-3 --hub hf
    minimind-mcore download --list

An interrupted download continues where it stopped. Files with a published SHA-256 are verified.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from minimind_mcore.cli.settings import env
from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import documented_parser
from minimind_mcore.paths import default_outputs, install_command
from minimind_mcore.pipeline.tables import KINDS, Entry, find, tables
from minimind_mcore.storage import disk_errors, free_bytes, sha256, writing

logger = logging.getLogger(__name__)

CLIENTS = {"modelscope": "modelscope", "hf": "huggingface_hub"}  # the Python package of each hub's client
MARGIN = 1.1  # clients write small extra files next to the download


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    parser = documented_parser("minimind-mcore download", __doc__)
    parser.add_argument("kind", nargs="?", choices=KINDS)
    parser.add_argument("name", nargs="?", help="a name that --list prints")
    parser.add_argument(
        "--hub", choices=("auto", *CLIENTS), default="auto", help="auto: the first hub whose client is installed"
    )
    parser.add_argument("--output", type=Path, help="directory (default: DATA_DIR or dataset; hf/NAME for models)")
    parser.add_argument("--list", action="store_true", help="print all names")
    args = parser.parse_args(argv)
    if args.list or not args.kind or not args.name:
        print(listing())
        if not args.list:
            raise UserError("the kind or the name is missing; give both, as in the list above")
        return
    entry = find(args.kind, args.name)
    hub = choose(args.hub)
    folder = args.output or default_folder(args.kind, args.name)
    require_space(folder, {args.name: entry})
    logger.info(f"{args.name} from {repository_of(entry, hub)} on {hub}, licence {entry['licence']}")
    fetch(hub, entry, folder, args.kind == "data")
    verify(folder, entry)
    logger.info(f"done: {folder}")


def listing() -> str:
    """Return all names with size and licence."""
    rows = [(kind, name, entry) for kind in KINDS for name, entry in tables()[kind].items()]
    return "\n".join(f"{kind:<13}{name:<23}{entry['gb']:7.3f} GB  {entry['licence']}" for kind, name, entry in rows)


def default_folder(kind: str, name: str) -> Path:
    """Return the default output directory of a download."""
    data = Path(env("DATA_DIR", str(default_outputs() / "dataset"))).absolute()
    return {"data": data, "tokenizer": data / "tokenizer"}.get(kind, default_outputs() / "hf" / name)


def choose(hub: str) -> str:
    """Return the hub to use. With "auto", HF_ENDPOINT selects Hugging Face.

    Raises:
        UserError: the client of the hub is not installed.
    """
    here = [name for name, package in CLIENTS.items() if importlib.util.find_spec(package)]
    if hub == "auto" and here:
        return "hf" if "hf" in here and env("HF_ENDPOINT") else here[0]
    if hub not in here:
        package = CLIENTS.get(hub, "modelscope")
        raise UserError(f"--hub {hub}: {package} is not installed: {install_command('download')}")
    return hub


def require_space(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Check that the disk has space for downloads, less what interrupted downloads have already written.

    Raises:
        UserError: the disk has too little free space.
    """
    files = {folder / file for entry in entries.values() for file in entry.get("files", [])}
    # Where the clients of Hugging Face and ModelScope keep files that are not complete.
    files.update(folder.glob(".cache/huggingface/**/*.incomplete"), folder.glob("._____temp/**/*"))
    if not all("files" in entry for entry in entries.values()):  # a whole repository
        files.update(folder.rglob("*"))
    there = sum(file.stat().st_size for file in files if file.is_file())
    needed = max(0.0, sum(entry["gb"] for entry in entries.values()) * 1e9 - there) * MARGIN
    if needed > (free := free_bytes(folder)):
        raise UserError(
            f"{', '.join(entries)}: {needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free; free "
            "some space, or give another directory"
        )


def repository_of(entry: Entry, hub: str) -> str:
    """Return the repository name of an entry on a hub."""
    return entry["modelscope"] if hub == "modelscope" else entry["hf"]


def fetch(hub: str, entry: Entry, folder: Path, is_data: bool) -> None:
    """Download an entry with a hub's client.

    Raises:
        UserError: the file does not exist, the hub cannot be reached, or the disk is full.
    """
    download = _modelscope if hub == "modelscope" else _hugging_face
    with writing(folder, "give another directory (--output, DATA_DIR)"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with disk_errors(folder):  # first, as ModelScope's client hides a full disk in an error of the download
            download(repository_of(entry, hub), entry.get("files"), folder, is_data)
    except UserError:
        raise
    except Exception as error:
        raise _explained(error, repository_of(entry, hub), hub) from error


def _hugging_face(repository: str, files: list[str] | None, folder: Path, is_data: bool) -> None:
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url

    kind = "dataset" if is_data else "model"
    for file in files or HfApi().list_repo_files(repository, repo_type=kind):
        hf_hub_download(repository, file, repo_type=kind, local_dir=folder)
        # huggingface_hub only compares file sizes. For large files the hub's ETag is the SHA-256.
        etag = get_hf_file_metadata(hf_hub_url(repository, file, repo_type=kind)).etag or ""
        if len(etag) == 64:
            require_digest(folder / file, etag)


def _modelscope(repository: str, files: list[str] | None, folder: Path, is_data: bool) -> None:
    from modelscope.hub.snapshot_download import dataset_snapshot_download, snapshot_download

    # modelscope verifies the SHA-256 of each file itself.
    get = dataset_snapshot_download if is_data else snapshot_download
    get(repository, local_dir=str(folder), allow_patterns=files)
    if missing := [file for file in files or () if not (folder / file).is_file()]:
        raise UserError(
            f"{repository}: ModelScope has no {', '.join(missing)}; minimind-mcore download --list prints the names"
        )


def verify(folder: Path, entry: Entry) -> None:
    """Compare files with the digests in the table.

    Raises:
        UserError: a file differs. The file is removed, so that the same command downloads it again.
    """
    for file, expected in entry.get("sha256", {}).items():
        require_digest(folder / file, expected)


def require_digest(file: Path, expected: str) -> None:
    """Compare a file with its published SHA-256.

    Raises:
        UserError: the digest differs. The file is removed, so that the same command downloads it again.
    """
    if (found := sha256(file)) != expected:
        file.unlink()
        raise UserError(
            f"{file}: found SHA-256 {found}, expected {expected}. The file was removed; run the same command again"
        )


def _explained(error: Exception, what: str, hub: str) -> UserError:
    """Turn a client's error into a `UserError`."""
    endpoint = env("HF_ENDPOINT", "huggingface.co") if hub == "hf" else env("MODELSCOPE_ENDPOINT", "www.modelscope.cn")
    text = " ".join(str(error).split())[:300]
    advice = "the received part is kept: run the same command again, or try another --hub or a mirror in HF_ENDPOINT"
    if "404" in text:
        advice = "minimind-mcore download --list prints the names"
    return UserError(f"{what}: the download from {hub} ({endpoint}) failed: {type(error).__name__}: {text}; {advice}")
