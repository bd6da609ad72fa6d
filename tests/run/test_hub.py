"""Uploads, against a server that speaks the Hub's endpoints that one takes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from es2fast import cli
from es2fast.errors import UserError
from es2fast.run.folder import RunFolder
from es2fast.run.hub import HubTarget

TOKEN = "hf_" + "secret" * 5


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
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The server, and a client that knows no other and has a token."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in (
        ("ENDPOINT", server.address),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_TOKEN_PATH", str(tmp_path / "token")),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("README.md", "config.json", "chat_template.jinja", "es2fast.yaml"):
        (model / name).write_text(f"{name}: text")
    save_file({"weight": torch.arange(6400.0)}, model / "model.safetensors")
    return model


def test_a_model_is_uploaded_whole_and_private(
    hub: Hub, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert HubTarget("tiny", public=False).push(folder) == f"{hub.address}/someone/tiny"
    private, files = hub.repositories["someone/tiny"]
    assert private
    assert files == {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".yaml"}
    weights = (folder / "model.safetensors").read_bytes()
    assert list(hub.blobs) == [hashlib.sha256(weights).hexdigest()]
    HubTarget("group/open", public=True).push(folder)
    assert not hub.repositories["group/open"][0]
    with pytest.raises(UserError, match="group/open is there already and public; add --public"):
        HubTarget("group/open", public=False)
    assert TOKEN not in "".join(capfd.readouterr())


def test_what_cannot_work_is_one_line(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, words: str) -> None:
        with pytest.raises(UserError) as told:
            HubTarget(name, public=False).push(folder)
        message = str(told.value)
        assert message.startswith("--push-to-hub: ") and words in message
        assert "\n" not in message and "hf_" not in message

    refused("not a name", "'not a name' is no repository's name")
    hub.writer = False
    refused("tiny", "the token may not write there")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("tiny", "the token is not accepted")
    monkeypatch.delenv("HF_TOKEN")
    refused("tiny", "there is no Hugging Face token")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("tiny", "HF_HUB_OFFLINE is set")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("tiny", "http://127.0.0.1:9 cannot be reached")
    assert hub.repositories == {} and hub.blobs == {}


def test_export_uploads_what_it_wrote(
    hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The command, to the end; a name that cannot be is found out before anything is written."""
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "model")
    RunFolder(run).summary.write_text("{}")

    def export(out: str, *options: str) -> int:
        monkeypatch.setattr("sys.argv", ["es2fast", "export", str(run), "--out", out, *options])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0)

    out = tmp_path / "out"
    assert export(str(out), "--push-to-hub", "not a name") == 2
    assert export(str(out), "--public") == 2
    said = capsys.readouterr().err
    assert "error: --push-to-hub: 'not a name'" in said
    assert "error: --public: nothing is uploaded; add --push-to-hub" in said and not out.exists()
    assert export(str(out), "--push-to-hub", "tiny") == 0
    assert f"written: {out}\nuploaded: {hub.address}/someone/tiny" in capsys.readouterr().out
    assert hub.repositories["someone/tiny"][0]
    assert export(f"{out}-2", "--push-to-hub", "group/open", "--public") == 0
    private, files = hub.repositories["group/open"]
    assert not private and "es2fast.yaml" not in files
    assert files["model.safetensors"] == (out / "model.safetensors").read_bytes()
