"""Uploads, against a server that speaks the Hub's endpoints that one takes."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_" + "secret" * 5
COMMAND = """
import sys
from pathlib import Path
from es2fast.errors import UserError
from es2fast.run.hub import HubTarget
name, folder, *public = sys.argv[1:]
try:
    print(HubTarget(name, public=bool(public)).push(Path(folder)))
except UserError as error:
    sys.exit(f"error: {error}")
"""


class Hub(ThreadingHTTPServer):
    """Repositories in memory: name -> (private, path -> content)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, tuple[bool, dict[str, bytes]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.writer = True  # the token may write
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        hub, name = self.server, self.path.removeprefix("/api/models/").partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/whoami-v2":
            self.answer(200, {"name": "someone", "type": "user"})
        elif name in hub.repositories:
            private, _ = hub.repositories[name]
            self.answer(200, {"id": name, "private": private, "siblings": [], "tags": []})
        else:
            self.answer(404, {"error": "Repository not found"})

    def do_PUT(self) -> None:
        self.server.blobs[self.path.removeprefix("/blob/")] = self.body()
        self.answer(200, {})

    def do_POST(self) -> None:
        hub, body = self.server, self.body()
        if not hub.writer:
            self.answer(403, {"error": "Forbidden"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            private = asked.get("private", asked.get("visibility") == "private")
            status = 409 if name in hub.repositories else 200
            hub.repositories.setdefault(name, (bool(private), {}))
            self.answer(status, {"url": f"{hub.address}/{name}"})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                found | {"actions": {"upload": {"href": f"{hub.address}/blob/{found['oid']}"}}}
                for found in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif self.path == "/api/validate-yaml":  # the card's
            self.answer(200, {"errors": [], "warnings": []})
        else:
            assert "/commit/" in self.path, self.path
            self.commit([json.loads(line) for line in body.splitlines()])

    def commit(self, lines: list[dict[str, Any]]) -> None:
        hub = self.server
        name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = hub.blobs[value["oid"]]
            else:
                continue
            hub.repositories[name][1][value["path"]] = content
        url = f"{hub.address}/{name}"
        self.answer(200, {"commitUrl": f"{url}/commit/1", "commitOid": "1", "success": True})


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("README.md", "config.json", "chat_template.jinja", "es2fast.yaml"):
        (model / name).write_text(f"{name}: text")
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    return model


def push(hub: Hub, *arguments: object, token: str | None = TOKEN, **more: str) -> tuple[str, str]:
    """What an upload in a process of its own says: (output, error)."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": "/nonexistent",
    }
    environment |= more | ({} if token is None else {"HF_TOKEN": token})
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert TOKEN not in done.stdout + done.stderr and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode != 0) == bool(errors), done.stderr
    return done.stdout.strip(), "".join(errors)


def test_a_model_is_uploaded_whole_and_private(hub: Hub, folder: Path) -> None:
    said, error = push(hub, "tiny", folder)
    assert (said, error) == (f"{hub.address}/someone/tiny", "")
    private, files = hub.repositories["someone/tiny"]
    assert private
    assert files == {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".yaml"}
    weights = (folder / "model.safetensors").read_bytes()
    assert list(hub.blobs) == [hashlib.sha256(weights).hexdigest()]
    said, error = push(hub, "group/open", folder, "public")
    assert error == "" and not hub.repositories["group/open"][0]
    said, error = push(hub, "group/open", folder)
    assert "group/open is there already and public; add --public" in error


def test_what_cannot_work_is_one_line(hub: Hub, folder: Path) -> None:
    for arguments, settings, words in (
        (("not a name",), {}, "'not a name' is no repository's name"),
        (("tiny",), {"token": None}, "there is no Hugging Face token"),
        (("tiny",), {"token": "hf_wrong"}, "the token is not accepted"),
        (("tiny",), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (("tiny",), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
    ):
        _, error = push(hub, *arguments, folder, **settings)  # type: ignore[arg-type]
        assert error.startswith("error: --push-to-hub: ") and words in error
    hub.writer = False
    _, error = push(hub, "tiny", folder)
    assert "the token may not write there" in error
    assert hub.repositories == {} and hub.blobs == {}
