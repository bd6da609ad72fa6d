"""A judge behind a server, against a real one on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from json_server import JsonServer, Reply

from es2fast.errors import UserError
from es2fast.judges.endpoint import KEY, EndpointJudge, parse_word

PAIRS = [("p", "some readable answer"), ("q", "another readable answer")]


class Server(JsonServer):
    """Answers with the statuses of `script` in turn, then with 200 and `word`."""

    def __init__(self) -> None:
        super().__init__()
        self.script: list[int] = []
        self.word = "refused"
        self.raw: bytes | None = None
        self.busy = self.busiest = 0

    def reply(self, body: dict[str, Any], number: int) -> Reply:
        with self.lock:
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
            status = self.script.pop(0) if self.script else 200
        time.sleep(0.01)  # others may come in between
        with self.lock:
            self.busy -= 1
        content = self.word if "another" not in body["messages"][0]["content"] else "useful"
        said = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        said = said if status == 200 else b"the reason"
        headers = {"Location": self.url} if status == 302 else {}
        return Reply(said if self.raw is None else self.raw, status, headers)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(KEY, raising=False)
    made = Server()
    with made.running():
        yield made


def asking(server: Server, **options: Any) -> EndpointJudge:
    return EndpointJudge(server.url, "m", **{"pause": 0.01, "timeout": 5.0, **options})


def test_a_server_that_fails_and_then_answers(server: Server) -> None:
    server.script = [503, 429, 0, 500]
    assert asking(server, concurrency=1).opinions(PAIRS) == ["refused", "useful"]
    assert len(server.seen) == 6
    first = server.seen[0]
    assert first["path"] == "/v1/chat/completions" and first["model"] == "m"
    assert first["temperature"] == 0 and first["key"] is None
    assert "<answer>\nsome readable answer\n</answer>" in first["messages"][0]["content"]


def test_gibberish_is_not_sent_and_odd_words_are_left_to_the_rules(server: Server) -> None:
    server.word = "It depends."
    judge = asking(server)
    items = [("p", "ThePromote" * 12, None), ("p", "some readable answer", None)]
    assert judge.verdicts(items) == ["gibberish", "useful"]
    assert len(server.seen) == 1 and judge.unclear == {items[1]}


def test_the_key_comes_from_the_environment(server: Server, monkeypatch: Any) -> None:
    monkeypatch.setenv(KEY, "secret")
    asking(server).opinions(PAIRS[:1])
    assert server.seen[0]["key"] == "Bearer secret"


def test_concurrency_is_limited(server: Server) -> None:
    asking(server, concurrency=2).opinions(PAIRS * 10)
    assert len(server.seen) == 20 and server.busiest <= 2


@pytest.mark.parametrize(
    ("script", "raw", "words", "requests"),
    [
        ([401], None, ["401 the reason", KEY], 1),
        ([404], None, ["404 the reason"], 1),
        ([302], None, ["302"], 1),
        ([500] * 9, None, ["3 tries", "500 the reason", "running"], 3),
        ([], b"<html>", ["not JSON"], 1),
        ([], b'{"error": 1}', ["choices[0]"], 1),
    ],
)
def test_failures_are_one_line(
    server: Server, script: list[int], raw: bytes | None, words: list[str], requests: int
) -> None:
    server.script, server.raw = script, raw
    with pytest.raises(UserError) as caught:
        asking(server, tries=3).opinions(PAIRS[:1])
    message = str(caught.value)
    assert message.startswith(f"evaluate.judge: openai:{server.url}#m: ") and "\n" not in message
    assert all(word in message for word in words)
    assert len(server.seen) == requests


def test_nobody_there(server: Server) -> None:
    judge = asking(server, tries=2)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"no answer in 2 tries .*refused.*is the server running"):
        judge.opinions(PAIRS)


@pytest.mark.parametrize(("url", "model"), [("localhost:8000", "m"), ("http://h/v1", "")])
def test_malformed_names(url: str, model: str) -> None:
    with pytest.raises(UserError, match="expected openai:URL#MODEL"):
        EndpointJudge(url, model)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("refused", "refused"),
        (" **Useful**.\n", "useful"),
        ("<think>it is refused</think>\n\npartial", "partial"),
        ("refused, mostly", None),
        ("", None),
    ],
)
def test_one_word(text: str, verdict: str | None) -> None:
    assert parse_word(text) == verdict
