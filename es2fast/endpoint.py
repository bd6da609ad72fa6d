"""Requests to an OpenAI-compatible server: one path of it, JSON there and back.

A request that may succeed later (429, 5xx, a broken connection) is tried again, until `stop` is
set. An API key is sent to the URL that the user gave and to no other.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from es2fast.errors import UserError


class Endpoint:
    """Where requests go.

    Args:
        url: base of the API, such as http://localhost:8000/v1, or the path itself.
        path: such as "/chat/completions".
        name: who asks, in front of every error, such as "evaluate.judge: openai:URL#MODEL".
        key: environment variable that may hold an API key.
        timeout: seconds for one request.
        tries: requests before it is given up.
        pause: seconds before the second try, doubled each time (a Retry-After header counts more).

    Attributes:
        stop: once set, by any thread, nothing is tried again.
    """

    def __init__(
        self, url: str, path: str, *, name: str, key: str, timeout: float, tries: int, pause: float
    ):
        self._url = url.rstrip("/").removesuffix(path) + path
        self._name, self._key = name, key
        self._timeout, self._tries, self._pause = timeout, tries, pause
        self.stop = threading.Event()

    def post(self, body: Mapping[str, Any]) -> Any:
        """The reply to one request.

        Raises:
            UserError: no server there, or one that refuses; a key that no header can hold.
        """
        data = json.dumps(body).encode()
        for attempt in range(self._tries):
            wait = self._pause * 2**attempt
            try:
                return self._request(data)
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {_said(error)}".strip()
                if error.code != 429 and error.code < 500:
                    hint = f"; set {self._key}" if error.code in (401, 403) else ""
                    raise self.error(reason + hint) from None
                wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", None) or error or type(error).__name__)
            if attempt + 1 == self._tries or self.stop.wait(wait):
                break
        raise self.error(f"no answer in {attempt + 1} tries ({reason}); is the server running?")

    def error(self, reason: str) -> UserError:
        """One that names who asked."""
        return UserError(f"{self._name}: {reason}")

    def _request(self, data: bytes) -> Any:
        headers, key = {"Content-Type": "application/json"}, os.environ.get(self._key)
        if key:
            if not (key.isascii() and key.isprintable()):
                raise self.error(f"{self._key} holds a line break or letters that no key has")
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, data, headers)
        opener = urllib.request.build_opener(_NoRedirects)
        with opener.open(request, timeout=self._timeout) as response:
            text = response.read()
        try:
            return json.loads(text)
        except ValueError:
            raise self.error("its reply is not JSON; is this the URL of its API?") from None


def is_url(text: str) -> bool:
    """Whether requests can go there."""
    try:
        parts = urlsplit(text)
    except ValueError:  # an unfinished address in brackets
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the key must not go elsewhere."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _said(error: urllib.error.HTTPError) -> str:
    """The server's own words, on one line."""
    try:
        return " ".join(error.read().decode(errors="replace").split())[:160]
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def _seconds(header: str | None) -> float:
    try:
        return min(float(header or 0), 120.0)
    except ValueError:
        return 0.0
