"""Base models of the hub: fetched once and only what is needed, resumed, and found again offline.

The hub is a small server here, which speaks what the real client asks for.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from commands import hdb
from typer.testing import Result

if TYPE_CHECKING:
    from cutdown import Narrow

COMMIT = "c" * 40
UNUSED = [
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "safety_checker/model.fp16.safetensors",
]
UNET = "unet/diffusion_pytorch_model.safetensors"


class Hub(ThreadingHTTPServer):
    """Serves the repository some/model from a folder; breaks the first download of the UNet off."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked: list[tuple[str, str]] = []  # (file, range)

    def files(self) -> dict[str, Path]:
        return {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob("*.*")}


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        start = f"/some/model/resolve/{COMMIT}/"
        if path == "/api/models/some/model/revision/main":
            self.answer(200, json.dumps({"id": "some/model", "sha": COMMIT}).encode())
        elif path == f"/api/models/some/model/tree/{COMMIT}":
            found = self.server.files().items()
            tree = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": etag(n)}
                for n, p in found
            ]
            self.answer(200, json.dumps(tree).encode())
        elif path.startswith(start) and path.removeprefix(start) in self.server.files():
            self.send_file(path.removeprefix(start))
        else:
            code = (
                "RevisionNotFound" if path.startswith("/api/models/some/model/") else "RepoNotFound"
            )
            self.answer(404, b"", X_Error_Code=code)

    do_HEAD = do_GET

    def send_file(self, name: str) -> None:
        data, wanted = self.server.files()[name].read_bytes(), self.headers.get("Range", "")
        about = {"ETag": f'"{etag(name)}"', "X_Repo_Commit": COMMIT}
        begin = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if self.command == "GET":
            first = name == UNET and not any(file == UNET for file, _ in self.server.asked)
            self.server.asked.append((name, wanted))
            if first:
                self.answer(200, data[: len(data) // 2], length=len(data), **about)
                self.close_connection = True
                return
        self.answer(206 if begin else 200, data[begin:], **about)


def etag(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


@pytest.fixture
def hub(narrow: Narrow, tmp_path: Path) -> Iterator[Hub]:
    with serving(published(narrow, tmp_path / "model")) as server:
        yield server


def published(narrow: Narrow, out: Path) -> Path:
    """Copy a cut-down 1.x, with all that repositories of the hub hold besides."""
    folder = shutil.copytree(narrow.folder("sd1"), out)
    for name in UNUSED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def add(home: Path, endpoint: str, *words: str) -> Result:
    """Run `hdb base add` where the hub is at this address, or out of reach without one: with what
    its client reads of its surroundings when it is imported."""
    around = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_OFFLINE": not endpoint,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HDB_HOME", str(home))
        for name, value in around.items():
            patch.setattr(f"huggingface_hub.constants.{name}", value)
        return hdb("base", "add", *words)


def test_a_model_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    (twice := hub.folder / UNET.replace("model.", "model.fp16.")).write_bytes(b"the same again")
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    try:
        done = add(tmp_path, endpoint, "one", "some/model", "--json")
    finally:
        twice.unlink()
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)  # bars go to standard error
    assert found["origin"] == f"some/model@{COMMIT[:12]}" and found["family"] == "sd1"
    half = (hub.folder / UNET).stat().st_size // 2
    first, second = (begun for name, begun in hub.asked if name == UNET)
    assert not first and 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= half
    assert not [name for name, _ in hub.asked if "fp16" in name or name in UNUSED]
    count = len(hub.asked)
    offline = add(tmp_path, "", "two", "some/model", "--json")
    assert offline.exit_code == 0, offline.stderr
    assert json.loads(offline.stdout)["digest"] == found["digest"] and len(hub.asked) == count
    for words, says in (
        (("x", "some/other"), "check its name"),
        (("x", "some/model", "--revision", "v9"), "some/model@v9"),
    ):
        refused = add(tmp_path, endpoint, *words)
        assert refused.exit_code == 1 and says in refused.stderr, refused.stderr
        assert refused.stderr.count("\n") == 1


def test_a_model_of_the_hub_in_half_precision_alone(narrow: Narrow, tmp_path: Path) -> None:
    folder = shutil.copytree(narrow.folder("sd1"), tmp_path / "model")
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    with serving(folder) as server:
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        done = add(tmp_path / "home", endpoint, "half", "some/model", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["family"] == "sd1"
    weights = [name for name, _ in server.asked if name.endswith(".safetensors")]
    assert len(weights) == 3 and all(".fp16." in name for name in weights)
