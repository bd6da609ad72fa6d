"""The teacher on disk: its numbers are the base model's, and a wrong file is never used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, write_prompts

from es2fast.config import parse_config
from es2fast.distributed.runtime import Runtime
from es2fast.errors import UserError
from es2fast.modeling.load import load_causal_lm
from es2fast.modeling.teacher import teacher_tokens
from es2fast.training import teacher_cache
from es2fast.training.plan import Plan, make_plan
from es2fast.training.teacher_cache import TeacherCache, cache_teacher

ALONE = Runtime(rank=0, world_size=1, device=torch.device("cpu"), dtype="fp32")


class Base:
    """The base model's pass, counted; it can be killed."""

    def __init__(self, plan: Plan, stop_after: int | None = None):
        self.model = load_causal_lm(plan.config.model, "fp32").eval()
        self.calls, self.stop_after = 0, stop_after

    def __call__(self, **inputs: Any) -> Any:
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        return teacher_tokens(self.model, **inputs)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several passes and several files from a dozen rows."""
    monkeypatch.setattr(teacher_cache, "SHARD_TOKENS", 40)
    monkeypatch.setattr(teacher_cache, "PASS_TOKENS", 30)


def plan_of(folder: Path, **changes: Any) -> Plan:
    if not (folder / "model").is_dir():
        save_tiny(folder / "model")
        write_prompts(folder / "data")
    sources = {name: str(folder / f"data/{name}.jsonl") for name in ("harmful", "harmless")}
    raw: dict[str, Any] = {
        "model": {"name": str(folder / "model"), "dtype": "fp32"},
        "data": sources | {"cache_dir": str(folder / "cache")} | changes.pop("data", {}),
        "kl": changes.pop("kl", {}),
        "train": {"device": "cpu", "teacher": "cache"} | changes,
        "deepspeed": "zero2",
        "output_dir": str(folder / "run"),
    }
    return make_plan(parse_config(raw))


def made(plan: Plan, base: Base | None = None) -> tuple[TeacherCache, Base]:
    base = base or Base(plan)
    return cache_teacher(plan, plan.groups.harmless, base, ALONE), base


@pytest.mark.parametrize("positions", ["all", "response", "last"])
def test_states_are_those_of_one_row_at_a_time(small: None, tmp_path: Path, positions: str) -> None:
    plan = plan_of(tmp_path, kl={"positions": positions})
    cache, base = made(plan)
    model = base.model.double()
    for rows in ([3], [7, 0, 3]):
        expected = []
        for row in rows:
            prompt = plan.groups.harmless[row]
            ids, answer = plan.formatter.conversation_ids(prompt, prompt.response or "")
            with torch.no_grad():
                found = model.model(torch.tensor([ids + answer])).last_hidden_state[0]
            first = {"all": 0}.get(positions, len(ids) - 1)
            count = {"all": len(ids + answer), "response": len(answer), "last": 1}[positions]
            expected.append(found[first : first + count])
        torch.testing.assert_close(
            cache.tokens(rows).double(), torch.cat(expected), rtol=1e-5, atol=1e-5
        )


def test_a_pass_that_was_killed_goes_on_where_it_was(small: None, tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        made(plan, Base(plan, stop_after=5))
    cache, rest = made(plan)
    fresh, whole = made(plan_of(tmp_path, data={"cache_dir": str(tmp_path / "other")}))
    assert len(cache.shards) > 2 and 0 < rest.calls < whole.calls
    assert torch.equal(cache.tokens(range(12)), fresh.tokens(range(12)))
    again, none = made(plan)
    assert none.calls == 0
    assert torch.equal(again.tokens([5]), cache.tokens([5]))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def other_tensors(path: Path) -> None:
    save_file({k: v + 1 for k, v in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_byte, "is damaged: its sha256"),
        (truncate, "bytes instead of"),
        (other_tensors, "is damaged: its sha256|bytes instead of"),
        (Path.unlink, "cannot be read"),
    ],
)
def test_a_damaged_file_is_named_and_made_again(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, reason: str
) -> None:
    plan = plan_of(tmp_path)
    cache, _ = made(plan)
    good = cache.tokens(range(12))
    victim = cache.folder / cache.shards[1].name
    damage(victim)
    capsys.readouterr()
    again, base = made(plan)
    told = capsys.readouterr().out
    assert base.calls == len(cache.shards[1].passes)
    assert f"warning: teacher cache: {str(victim)!r}" in told
    assert any(part in told for part in reason.split("|"))
    assert torch.equal(again.tokens(range(12)), good)


def test_a_wrong_index_is_named_and_nothing_of_it_is_used(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(tmp_path)
    cache, _ = made(plan)
    index = json.loads(cache.index_path.read_text())
    index["meaning"]["model"] = "another"
    for text, reason in ((json.dumps(index), "another model"), ("{", "not a readable index")):
        cache.index_path.write_text(text)
        capsys.readouterr()
        _, base = made(plan)
        told = capsys.readouterr().out
        assert base.calls and str(cache.index_path) in told and reason in told


def test_whatever_the_numbers_depend_on_leads_to_another_folder(tmp_path: Path) -> None:
    folders = [
        made(plan_of(tmp_path, **change))[0].folder
        for change in (
            {}, {"kl": {"positions": "last"}}, {"data": {"max_response_tokens": 3}},
            {"data": {"system_prompt": "please"}}, {"teacher": "moments"},
            {"teacher": "moments", "kl": {"temperature": 2.0}},
        )
    ]  # fmt: skip
    save_tiny(tmp_path / "model", seed=1)
    folders.append(made(plan_of(tmp_path))[0].folder)
    assert len(set(folders)) == len(folders)
    same = made(plan_of(tmp_path, kl={"temperature": 2.0}))[0]  # states know no temperature
    assert same.folder == folders[-1]


def test_moments_are_read_back_with_their_head(small: None, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, teacher="moments", kl={"temperature": 1.5})
    cache, base = made(plan)
    for found in (cache, made(plan)[0]):
        moments = found.tokens([2, 9])
        moments.check_head(base.model.lm_head.weight)
        assert moments.temperature == 1.5 and len(moments) == sum(
            cache.rows[i].kept for i in (2, 9)
        )


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plan = plan_of(tmp_path, data={"cache_dir": str(tmp_path / "file")})
    with pytest.raises(UserError, match=r"data\.cache_dir: .*file.* cannot be written"):
        made(plan)
