"""A real HTTP server on this machine for what asks servers: JSON there, anything back."""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """status 0: the connection breaks."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class JsonServer(ThreadingHTTPServer, ABC):
    """Keeps what it was asked: each body, with its `path` and API `key`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.seen: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @abstractmethod
    def reply(self, body: dict[str, Any], number: int) -> Reply:
        """The answer to the request of that number, from 1 on."""

    @contextmanager
    def running(self) -> Iterator[None]:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            self.shutdown()
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: JsonServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            asked = {"path": self.path, "key": self.headers["Authorization"]}
            self.server.seen.append(asked | body)
            number = len(self.server.seen)
        reply = self.server.reply(body, number)
        if reply.status == 0:
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in ({"Content-Length": str(len(reply.body))} | dict(reply.headers)).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, *arguments: Any) -> None:
        pass
