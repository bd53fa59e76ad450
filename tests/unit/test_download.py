"""Downloads through the hubs' own clients, from a server of this process that speaks both hubs' HTTP."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
from helpers.engine import ROOT

from minimind_mcore.paths import package_json
from minimind_mcore.pipeline import download, tables

CONTENT = b'{"conversations": []}\n' * 1_000_000  # more than a client buffers
FILE = "lora_identity.jsonl"


class Hub(http.server.ThreadingHTTPServer):
    """A hub with one file of one dataset.

    Attributes:
        published: the SHA-256 that the hub states.
        cut: bytes after which the connection is cut, once.
        ranges: the Range headers of the downloads.
    """

    published = hashlib.sha256(CONTENT).hexdigest()
    cut: int | None = None
    missing = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlparse(self.path)
        wanted = parse_qs(url.query).get("FilePath", [url.path.rpartition("/")[2]])[0]
        if url.path.startswith("/api/models/"):  # what a snapshot has, for either call of Hugging Face's client
            listed = [{"type": "file", "path": FILE, "rfilename": FILE, "oid": "b" * 40, "size": len(CONTENT)}]
            about = {"id": "minimind-3", "sha": "a" * 40, "siblings": listed}
            self.send(200, json.dumps(listed if "/tree/" in url.path else about).encode())
        elif url.path.endswith("/repo/tree"):
            entry = {"Path": FILE, "Name": FILE, "Type": "blob", "Size": len(CONTENT), "Sha256": self.server.published}
            listed = {"Code": 200, "Success": True, "Data": {"Files": [entry], "TotalCount": 1}}
            self.send(200, json.dumps(listed).encode())
        elif wanted == FILE and not self.server.missing and ("resolve" in url.path or url.path.endswith("/repo")):
            self.send_file()
        else:
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send_file(self) -> None:
        asked = self.headers.get("Range")
        begin = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        body = CONTENT[begin:]
        self.send_response(206 if asked else 200)
        headers = {
            "ETag": f'"{self.server.published}"', "X-Repo-Commit": "a" * 40, "Accept-Ranges": "bytes",
            "Content-Length": str(len(body)), "Content-Type": "application/octet-stream",
        }  # fmt: skip
        if asked:
            headers["Content-Range"] = f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "GET":
            return
        self.server.ranges.append(asked)
        cut, self.server.cut = self.server.cut, None
        try:
            self.wfile.write(body[:cut])
        except ConnectionError:  # the client gave up, on a full disk
            self.close_connection = True
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(2)
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


HUBS = ["hf", "modelscope"]


def get(
    name: str, address: str, folder: Path, what: str = "data lora_identity", **changes: str
) -> subprocess.CompletedProcess[str]:
    """Download in a process of its own: the clients read their settings when they are imported."""
    pytest.importorskip(download.CLIENTS[name])
    settings = {
        "HF_ENDPOINT": address, "MODELSCOPE_ENDPOINT": address, "HOME": str(folder / "home"), "DATA_DIR": str(folder),
        "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", **changes,
    }  # fmt: skip
    command = [sys.executable, "-m", "minimind_mcore.cli", "download", *what.split(), "--hub", name]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=200, check=False)


def address(hub: Hub) -> str:
    return f"http://127.0.0.1:{hub.server_address[1]}"


@pytest.mark.parametrize("name", HUBS)
def test_a_cut_download_is_completed(name: str, hub: Hub, tmp_path: Path) -> None:
    hub.cut = 15_000_000
    for _ in range(2):  # a client may retry by itself, or leave it to the next command
        done = get(name, address(hub), tmp_path)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    assert (tmp_path / FILE).read_bytes() == CONTENT
    assert "Apache-2.0" in done.stdout
    assert hub.ranges[-1] is not None, hub.ranges  # it goes on where it was cut


@pytest.mark.parametrize("name", HUBS)
def test_a_wrong_digest_is_an_error_and_leaves_no_file(name: str, hub: Hub, tmp_path: Path) -> None:
    hub.published = "0" * 64
    done = get(name, address(hub), tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr.partition("error:")[2]
    assert any(word in done.stderr for word in ("SHA-256", "Hash mismatch", "integrity")), done.stderr
    assert not (tmp_path / FILE).exists()


def test_every_file_of_weights_is_compared_with_its_digest(hub: Hub, tmp_path: Path) -> None:
    words = f"weights minimind-3 --output {tmp_path}"
    done = get("hf", address(hub), tmp_path, words)
    assert done.returncode == 0 and (tmp_path / FILE).read_bytes() == CONTENT, done.stderr
    hub.published = "0" * 64
    done = get("hf", address(hub), tmp_path / "other", f"{words}/other")
    assert done.returncode == 1 and "SHA-256" in done.stderr, done.stderr
    assert not (tmp_path / "other" / FILE).exists()


@pytest.mark.parametrize("name", HUBS)
def test_a_missing_file_is_named(name: str, hub: Hub, tmp_path: Path) -> None:
    hub.missing = True
    done = get(name, address(hub), tmp_path)
    assert done.returncode == 1
    assert "404" in done.stderr and "minimind_dataset" in done.stderr and "--list" in done.stderr, done.stderr


@pytest.mark.parametrize("name", HUBS)
def test_offline_is_one_message(name: str, hub: Hub, tmp_path: Path) -> None:
    fast = {"HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2", "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "1"}
    done = get(name, "http://127.0.0.1:9", tmp_path, **fast)
    assert done.returncode == 1
    assert "run the same command again" in done.stderr and "127.0.0.1:9" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_download_that_the_disk_has_no_room_for_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**9}))
    monkeypatch.setattr(download, "fetch", lambda *words: pytest.fail("the download began"))
    with pytest.raises(download.UserError, match=r"pretrain_t2t_mini: 1\.3 GB are needed in .*, 1\.0 GB are free"):
        download.main(["data", "pretrain_t2t_mini", "--output", str(tmp_path)])


@pytest.mark.parametrize("partial", [".cache/huggingface/download/x.incomplete", "._____temp/pretrain_t2t_mini.jsonl"])
def test_what_an_interrupted_download_has_written_is_not_needed_again(
    partial: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**9}))
    began: list[str] = []
    monkeypatch.setattr(download, "fetch", lambda *words: began.append("fetch"))
    monkeypatch.setattr(download, "choose", lambda hub: "hf")
    file = tmp_path / partial
    file.parent.mkdir(parents=True)
    with file.open("wb") as hole:
        hole.truncate(5 * 10**8)
    download.main(["data", "pretrain_t2t_mini", "--output", str(tmp_path)])
    assert began == ["fetch"]


def test_a_finished_model_needs_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    with (tmp_path / "model.safetensors").open("wb") as hole:
        hole.truncate(150_000_000)
    entry = tables.find("weights", "minimind-3")
    download.require_space(tmp_path, {"minimind-3": entry})
    with pytest.raises(download.UserError, match=r"minimind-3: 0\.2 GB are needed"):
        download.require_space(tmp_path / "other", {"minimind-3": entry})


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "choose", lambda hub: "hf")
    (tmp_path / "file").write_text("")
    with pytest.raises(download.UserError, match="file: cannot be written"):
        download.main(["data", "lora_identity", "--output", str(tmp_path / "file")])


@pytest.mark.parametrize("name", HUBS)
def test_a_full_disk_is_one_message_and_the_same_command_goes_on(name: str, hub: Hub, tmp_path: Path) -> None:
    """A limit of the size of a file stands for the disk: it meets the client in the same call."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (15_000_000, resource.RLIM_INFINITY))"
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"{limit}\n")
    once = {"MODELSCOPE_DOWNLOAD_MAX_RETRIES": "1"}
    done = get(name, address(hub), tmp_path, PYTHONPATH=f"{site}:{ROOT}", **once)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr, done.stderr
    assert "too large" in done.stderr and "run the same command again" in done.stderr, done.stderr
    done = get(name, address(hub), tmp_path)
    assert done.returncode == 0 and (tmp_path / FILE).read_bytes() == CONTENT, done.stderr


def test_names_sizes_and_licences_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    download.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["data", "pretrain_t2t_mini", "1.200", "GB", "Apache-2.0"] for line in lines)
    assert len(lines) == sum(map(len, tables.tables().values()))


@pytest.mark.parametrize(("name", "message"), [
    ("pretrain_hq", "upstream withdrew pretrain_hq; its replacement is pretrain_t2t_mini"),
    ("pretrain_t2t_min", "did you mean pretrain_t2t_mini"),
    ("rlaif-mini.jsonl", "upstream withdrew rlaif-mini; its replacement is rlaif"),
    ("LoRA_identity", "did you mean lora_identity"),
    ("sft_tool_call", "make it with minimind-mcore tool-data"),
])  # fmt: skip
def test_unknown_and_withdrawn_names(name: str, message: str) -> None:
    with pytest.raises(download.UserError, match=message):
        download.main(["data", name])


def test_every_withdrawn_name_has_a_successor_in_the_table() -> None:
    assert set(package_json(tables.TABLE)["withdrawn"].values()) <= tables.tables()["data"].keys()
