"""Answers of an inference server, here a tiny model behind a real one on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from json_server import JsonServer, Reply
from tiny_models import save_tiny, write_prompts

from es2fast.cli import respond as command
from es2fast.config import Config, parse_config, save_config
from es2fast.distributed.runtime import Runtime
from es2fast.errors import UserError
from es2fast.judges.endpoint import KEY as JUDGES_KEY
from es2fast.modeling.load import load_causal_lm
from es2fast.training.plan import make_plan
from es2fast.training.prepare import own_refusals
from es2fast.training.refusals import answer_tokens
from es2fast.training.responses import fill_responses, response_cache, without_responses
from es2fast.training.server_responses import KEY, respond

ALONE = Runtime(rank=0, world_size=1, device=torch.device("cpu"), dtype="fp32")


class Server(JsonServer):
    """Greedy answers by transformers, special tokens left out, as vLLM gives them."""

    def __init__(self, config: Config):
        super().__init__()
        self.model = load_causal_lm(config.model, "fp32").eval()
        self.tokenizer = make_plan(config).formatter.tokenizer
        self.bad: list[int] = []  # the prompt that is refused
        self.extra = 0  # tokens that it puts in front
        self.raw: dict[str, Any] | None = None
        self.busy = False  # every second request

    @property
    def name(self) -> str:
        return f"{self.url}#base"

    def reply(self, body: dict[str, Any], number: int) -> Reply:
        if body["prompt"] == self.bad:
            return Reply(b"out of order", 400)
        if self.busy and number % 2:
            return Reply(b"busy", 503)
        return Reply(json.dumps(self.raw or self.answer(body)).encode())

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = [self.tokenizer.bos_token_id] * self.extra + body["prompt"]
        with self.lock, torch.no_grad():
            out = self.model.generate(
                torch.tensor([ids]), max_new_tokens=body["max_tokens"], do_sample=False,
                eos_token_id=body["stop_token_ids"], pad_token_id=0,
                repetition_penalty=body.get("repetition_penalty", 1.5),  # a model's own default
            )  # fmt: skip
        text = self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        return {"choices": [{"text": text}], "usage": {"prompt_tokens": len(ids)}}


def on_a_cpu(config: Config) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    files = write_prompts(tmp_path / "data")
    rows = [json.loads(line) for line in Path(files["harmless"]).read_text().splitlines()]
    for row in rows[:8]:  # the other four bring their responses
        del row["response"]
    Path(files["harmless"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw: dict[str, Any] = {
        "model": {"name": str(save_tiny(tmp_path / "model")), "dtype": "fp32"},
        "data": files | {"cache_dir": str(tmp_path / "cache"), "max_response_tokens": 9},
        "refusal": {"weight": 1.0, "fallback": ["no ."]},
        "train": {"device": "cuda", "micro_batch_size": 2},  # whatever this machine has
        "output_dir": str(tmp_path / "run"),
    }
    return parse_config(raw)


@pytest.fixture
def server(config: Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setenv(JUDGES_KEY, "another's")
    made = Server(on_a_cpu(config))
    with made.running():
        yield made


def test_a_training_finds_the_answers_that_it_would_write(
    config: Config, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(config, tmp_path / "run.yaml")
    command(tmp_path / "run.yaml", server.name)
    said = capsys.readouterr().out.splitlines()
    here = on_a_cpu(config)
    plan = make_plan(here)
    harmful = plan.groups.harmful
    assert said[:2] == [
        "answers to harmless prompts: 8 written, 0 there before",
        f"answers to harmful prompts: {len(harmful)} written, 0 there before",
    ]
    assert {one["path"] for one in server.seen} == {"/v1/completions"}
    assert {one["max_tokens"] for one in server.seen} == {9, answer_tokens(config)}
    assert all(one["temperature"] == 0 and one["key"] is None for one in server.seen)

    nobody = torch.nn.Identity()  # no model is asked
    filled = fill_responses(plan, nobody, ALONE)
    refusals = own_refusals(plan, nobody, ALONE)
    alone = here.model_copy(
        update={"data": here.data.model_copy(update={"cache_dir": str(tmp_path / "other")})}
    )
    model = load_causal_lm(config.model, "fp32").eval()
    written = fill_responses(make_plan(alone), model, ALONE)
    assert refusals is not None and refusals == own_refusals(make_plan(alone), model, ALONE)
    assert [one.response for one in filled] == [one.response for one in written]
    assert len({one.response for one in filled}) > 3

    command(tmp_path / "run.yaml", server.name)
    assert "answers to harmless prompts: 0 written, 8 there before" in capsys.readouterr().out


def test_what_is_answered_beside_a_failure_is_kept(config: Config, server: Server) -> None:
    plan = make_plan(on_a_cpu(config))
    bad = plan.groups.harmless[2]
    server.bad = plan.formatter.prompt_ids(bad)
    with pytest.raises(UserError, match=r"--server: http.*#base: 400 out of order"):
        respond(config, server.name, concurrency=8)
    cache = response_cache(plan, config.data.max_response_tokens)
    assert cache.missing(plan.groups.harmless) == [bad]
    server.bad = []
    found, cache = respond(config, server.name, concurrency=4)
    assert [(one.known, one.written) for one in found] == [(7, 1), (0, 12)]
    assert cache.path.read_text().count("\n") == 20


def test_nothing_is_tried_again_after_a_failure(config: Config, server: Server) -> None:
    """One answer is of no use, so nobody waits for those that a busy server puts off."""
    server.raw = {"usage": {"prompt_tokens": 0}}
    server.busy = True
    with pytest.raises(UserError, match="no choices"):
        respond(config, server.name, concurrency=8, tries=2, pause=5.0)
    asked = [tuple(one["prompt"]) for one in server.seen]
    assert len(set(asked)) == len(asked) > 1


def test_the_key_goes_along(
    config: Config, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "secret")
    respond(config, server.name)
    assert {one["key"] for one in server.seen} == {"Bearer secret"}


def test_a_server_that_reads_something_else_is_refused(config: Config, server: Server) -> None:
    server.extra = 1
    with pytest.raises(UserError, match=r"it read \d+ tokens where \d+ were sent.*model\.name"):
        respond(config, server.name)
    plan = make_plan(on_a_cpu(config))
    cache = response_cache(plan, config.data.max_response_tokens)
    assert len(cache.missing(without_responses(plan.groups.harmless))) == 12
    usage = {"prompt_tokens": 4}
    for choice in ({"message": {"content": "x"}}, {"text": None}):
        server.raw = {"choices": [choice], "usage": usage}
        with pytest.raises(UserError, match=r"no choices\[0\]\.text or usage\.prompt_tokens"):
            respond(config, server.name)


@pytest.mark.parametrize(
    "name", ["localhost:8000#m", "http://localhost:8000/v1", "http://h/v1#", "http://[::1/v1#m"]
)
def test_half_an_address_is_refused(config: Config, name: str) -> None:
    with pytest.raises(UserError, match=r"--server: .*expected URL#MODEL, such as http"):
        respond(config, name)
