"""Evaluation on models that have learnt next to nothing: its bookkeeping, and what a stop costs."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import weakref
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from es2fast.attacks.registry import make_attacks
from es2fast.attacks.states.mean_difference import MeanDifference
from es2fast.attacks.states.scav import Scav
from es2fast.config import DataConfig, EvaluateConfig, parse_config
from es2fast.data import Formatter, Prompt
from es2fast.demo.toy import Recipe, build_toy, split_rows
from es2fast.errors import UserError
from es2fast.evaluation.answering import EvaluationPrompts, Subject, SubjectAnswers
from es2fast.evaluation.answers import HARMFUL, AnswerLog, Scope
from es2fast.evaluation.measure import Measured
from es2fast.evaluation.run import (
    evaluate_models,
    evaluate_paths,
    model_names,
    saved_states,
    weights_of,
)
from es2fast.evaluation.split import attackers_prompts
from es2fast.evaluation.teacher import SavedTeacher, token_batches, token_stats
from es2fast.judges import registry
from es2fast.judges.calibration import calibrate
from es2fast.judges.rules import RulesJudge
from es2fast.modeling.taps import blocks
from es2fast.report.schema import BASE, ModelResult
from es2fast.run.folder import RunFolder

RECIPE = Recipe(hidden=16, ffn=16, depth=3, heads=2, answer_steps=2, align_steps=2,
                answer_batch=4, align_batch=4)  # fmt: skip
SCAV = {"name": "scav", "p1": 0.5}  # probes of this model are right for 58 % of the states
CONFIG = EvaluateConfig(max_new_tokens=4, batch_size=5, attacks=["direct", SCAV, "mean_difference"])
Parts = tuple[Any, Formatter, EvaluationPrompts]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = build_toy(tmp_path_factory.mktemp("small") / "toy", progress=False, recipe=RECIPE)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    formatter = Formatter(AutoTokenizer.from_pretrained(folder / "model"), DataConfig())
    split = split_rows(0, RECIPE)
    prompts = EvaluationPrompts(
        [Prompt.of(row.prompt, row.answer) for row in split["eval_harmful"][:7]],
        [Prompt.of(row.prompt, row.answer) for row in split["eval_harmless"][:7]],
        [Prompt.of(row.prompt) for row in split["harmful"][:20]],
        [Prompt.of(row.prompt, row.answer) for row in split["harmless"][:20]],
    )
    return model, formatter, prompts


def scaled(model: Any, factor: float) -> Any:
    """A copy whose block 1 writes `factor` times as much into the residual stream."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.model.layers[1].mlp.down_proj.weight.mul_(factor)
    return tuned


def pair(parts: Parts, factor: float = 5.0) -> list[Subject]:
    model, formatter, _ = parts
    return [
        Subject.of(BASE, model, formatter),
        Subject.of("tuned", scaled(model, factor), formatter),
    ]


def test_both_models_are_compared(parts: Parts, tmp_path: Path) -> None:
    report = evaluate_models(pair(parts), parts[2], CONFIG, RunFolder(tmp_path), layers=[0, 1])
    base, tuned = report.model(BASE), report.model("tuned")
    assert base.harmless.kl_to_base == 0.0 < tuned.harmless.kl_to_base
    for row in base.separation.values():
        assert row.distance_over_base == row.norm_ratio == 1.0
        assert row.probe_interval[0] <= row.probe_accuracy <= row.probe_interval[1]
        assert row.probe_margin_interval[0] <= row.probe_margin <= row.probe_margin_interval[1]
        assert row.positions["instruction"].distance_over_base == 1.0
    assert tuned.separation["1"].positions["instruction"].distance_over_base != 1.0
    assert tuned.separation["0"].distance_over_base == pytest.approx(1.0)
    assert tuned.separation["1"].distance_over_base != pytest.approx(1.0, abs=1e-3)
    assert set(tuned.shift_rank) == {"0", "1"} and base.shift_rank is None
    for attack in base.attacks.values():
        assert attack.refused + attack.useful + attack.gibberish == pytest.approx(1.0)
        assert attack.n == 7 and attack.answers_per_prompt == 1
    states = saved_states(RunFolder(tmp_path), report.names, 1)
    assert states["tuned"]["harmful"].shape == (7, 16)
    assert not (tmp_path / "measured" / "teacher").exists()


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was(parts: Parts, training: bool, tmp_path: Path) -> None:
    model = copy.deepcopy(parts[0]).train(training)
    before = copy.deepcopy(model.state_dict())
    evaluate_models([Subject.of(BASE, model, parts[1])], parts[2], CONFIG, RunFolder(tmp_path))
    assert model.training is training
    assert all(not block._forward_hooks for block in blocks(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_token_figures_are_those_of_full_logits_whatever_the_batches(
    parts: Parts, batch_size: int, tmp_path: Path
) -> None:
    model, formatter, prompts = parts
    tuned, rows = scaled(model, 5.0), prompts.harmless
    responses = [prompt.response for prompt in rows]
    kl, kl_response, agree, nll = [], [], [], []
    with torch.no_grad():
        for prompt, response in zip(rows, responses):
            prompt_ids, response_ids = formatter.conversation_ids(prompt, response)
            ids = torch.tensor([[*prompt_ids, *response_ids]])
            p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (model, tuned))
            kl += (p.exp() * (p - q)).sum(-1).tolist()
            first = len(prompt_ids) - 1
            kl_response += kl[-ids.shape[1] :][first:-1]
            agree += (p.argmax(-1) == q.argmax(-1)).tolist()[first:-1]
            nll += [-q[first + i, token].item() for i, token in enumerate(response_ids)]
    teacher = SavedTeacher(tmp_path / "teacher", "key")
    batches = token_batches(formatter, rows, responses, batch_size)
    assert not teacher.complete
    teacher.write(model, batches, "base")
    assert teacher.complete and not SavedTeacher(tmp_path / "teacher", "other").complete
    found = teacher.compare(tuned, batches, "tuned")
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert found.kl_response == pytest.approx(sum(kl_response) / len(kl_response), rel=1e-4)
    assert found.top1 == sum(agree) / len(agree)
    assert found.nll == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    alone = token_stats(tuned, batches, "tuned")
    assert alone.nll == found.nll and alone.kl is alone.top1 is None


def test_without_a_response_the_base_model_s_own_answer_is_the_reference(
    parts: Parts, tmp_path: Path
) -> None:
    model, formatter, prompts = parts
    bare = EvaluationPrompts(
        prompts.harmful,
        [Prompt.of(p.text) for p in prompts.harmless],
        prompts.fit_harmful,
        prompts.fit_harmless,
    )
    same = [Subject.of(BASE, model, formatter), Subject.of("copy", copy.deepcopy(model), formatter)]
    report = evaluate_models(same, bare, CONFIG, RunFolder(tmp_path))
    for name in (BASE, "copy"):
        assert report.model(name).harmless.intact_rate == 1.0
        assert report.model(name).harmless.kl_to_base == pytest.approx(0.0, abs=1e-6)
    alone = [Subject.of("copy", model, formatter)]
    report = evaluate_models(alone, bare, CONFIG, RunFolder(tmp_path / "alone"))
    assert report.model("copy").harmless.intact_rate is None
    assert report.model("copy").harmless.kl_to_base is None


def plain(report: Any) -> dict[str, Any]:
    """A report without the times: when it was made, and what each attack took."""
    found = report.model_dump(exclude={"created"})
    for model in found["models"]:
        for attack in model["attacks"].values():
            assert attack.pop("seconds") > 0
    return found


# while a block is chosen; while a strength is; in the last batch
@pytest.mark.parametrize("when", [11, 70, 103])
def test_an_interrupted_evaluation_goes_on_and_ends_the_same(
    parts: Parts, when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate_models(pair(parts), parts[2], CONFIG, RunFolder(tmp_path / "whole"))
    folder, taken = RunFolder(tmp_path / "stopped"), 0
    real = MeanDifference.push

    def stops(self: MeanDifference, layer: int, states: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == when:
            raise KeyboardInterrupt
        return real(self, layer, states)

    monkeypatch.setattr(MeanDifference, "push", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate_models(pair(parts), parts[2], CONFIG, folder)
    before = folder.answers.read_bytes()
    with folder.answers.open("ab") as file:
        file.write(b'{"key": "torn')
    again = evaluate_models(pair(parts), parts[2], CONFIG, folder)
    assert plain(again) == plain(whole)
    assert folder.answers.read_bytes().startswith(before)
    lines = [json.loads(line) for line in (tmp_path / "whole/answers.jsonl").open()]
    kept = [json.loads(x) for x in folder.answers.read_text().splitlines() if x.endswith("}")]
    assert kept == lines
    fields = {"model", "group", "prompt_id", "attack", "parameters", "seed", "prompt", "text"}
    assert all(fields <= line.keys() for line in lines)


def test_what_is_known_needs_no_model(parts: Parts, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    first = evaluate_models(pair(parts), parts[2], CONFIG, folder, layers=[1])
    subjects = pair(parts)
    for subject in subjects:
        subject.load = None  # type: ignore[assignment]
    assert plain(evaluate_models(subjects, parts[2], CONFIG, folder, layers=[1])) == plain(first)


@pytest.mark.parametrize("factor, seed", [(50.0, 0), (1.0, 1)])
def test_what_is_told_of_an_attack_is_of_this_model_and_seed(
    parts: Parts, factor: float, seed: int, tmp_path: Path
) -> None:
    """Two models of one name, or two seeds, one after the other in one folder."""
    model, formatter, prompts = parts

    def told(factor: float, seed: int, folder: Path) -> Any:
        subjects = [Subject.of("model", scaled(model, factor), formatter)]
        settings = EvaluateConfig(max_new_tokens=4, attacks=[SCAV], seed=seed)
        report = evaluate_models(subjects, prompts, settings, RunFolder(folder))
        return report.models[0].attacks["scav"].model_dump()

    told(1.0, 0, tmp_path / "one")
    record = tmp_path / "one" / "measured" / "model.scav.json"
    first = json.loads(record.read_text())
    first["summary"]["relative_push"] = first["seconds"] = 1000.0
    record.write_text(json.dumps(first))
    second, alone = (told(factor, seed, tmp_path / name) for name in ("one", "two"))
    assert 0 < second.pop("seconds") < 1000 and alone.pop("seconds")
    assert second == alone


def test_other_settings_mean_other_answers(parts: Parts, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    subjects = pair(parts)[:1]
    count = []
    for p0 in (1e-3, 0.4, 0.4):
        attack = SCAV | {"p0": p0, "blocks": ["all"], "steps": "all", "repetition_penalty": 1.0}
        settings = EvaluateConfig(max_new_tokens=4, batch_size=5, attacks=[attack])
        evaluate_models(subjects, parts[2], settings, folder)
        count.append(len(folder.answers.read_text().splitlines()))
    assert count == [14, 21, 21]  # 7 harmless answers, then 7 of each attack: nothing to choose


def test_answers_are_kept_under_all_that_they_depend_on(parts: Parts, tmp_path: Path) -> None:
    model, formatter, prompts = parts

    def scopes(
        judge: str = "rules", response: str | None = None, length: int = 512, answer: int = 128
    ) -> list[Scope]:
        data = DataConfig(max_length=length, max_response_tokens=answer)
        subject = Subject.of(BASE, model, Formatter(formatter.tokenizer, data))
        fit = [Prompt.of(prompt.text, response) for prompt in prompts.fit_harmful]
        asked = dataclasses.replace(prompts, fit_harmful=fit)
        folder, decides = RunFolder(tmp_path), registry.make_judges(judge)[0]
        log = AnswerLog(folder.answers)
        part = SubjectAnswers(subject, asked, CONFIG, folder, log, decides)
        return [part.scope(attack, HARMFUL) for attack in make_attacks(["direct", "scav"])]

    direct, scav = scopes()
    assert scopes() == [direct, scav]
    other = scopes(judge="rules:gcg")
    assert other[0] == direct and other[1] != scav  # the one that searches
    assert scopes(response="sure")[1] != scav
    assert scopes(length=64)[0].fingerprint != direct.fingerprint
    assert scopes(answer=64)[0].fingerprint != direct.fingerprint  # responses are cut there


def test_what_is_measured_stays_apart_where_names_hold_dots(tmp_path: Path) -> None:
    names = ["Qwen2.5-0.5B", "Qwen2.5-0.5B-Instruct"]
    for name in names:
        Measured(name, states={"harmful": {0: torch.zeros(1, 2)}}).save(tmp_path / name)
    found = [Measured.load(tmp_path / name) for name in names]
    assert [one and one.fingerprint for one in found] == names


def test_what_the_base_left_is_not_compared_in_other_batches(parts: Parts, tmp_path: Path) -> None:
    """An evaluation that was stopped before the comparison goes on with another batch size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SavedTeacher, "compare", _stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate_models(pair(parts), parts[2], CONFIG, RunFolder(tmp_path / "one"))
    settings = CONFIG.model_copy(update={"batch_size": 3})
    found = [
        evaluate_models(pair(parts), parts[2], settings, RunFolder(tmp_path / name))
        for name in ("one", "two")
    ]
    kl, wanted = (report.model("tuned").harmless.kl_to_base for report in found)
    assert kl == pytest.approx(wanted, rel=1e-6)


def _stopped(*arguments: Any) -> Any:
    raise KeyboardInterrupt


def test_one_model_is_in_memory_at_a_time(parts: Parts, tmp_path: Path) -> None:
    model, formatter, prompts = parts
    alive: list[weakref.ref[Any]] = []

    def load(factor: float) -> Any:
        gc.collect()
        assert all(ref() is None for ref in alive)
        made = scaled(model, factor)
        alive.append(weakref.ref(made))
        return made

    subjects = [
        Subject(name, lambda f=factor: load(f), formatter, name)
        for name, factor in ((BASE, 1.0), ("a", 2.0), ("b", 3.0))
    ]
    report = evaluate_models(subjects, prompts, CONFIG, RunFolder(tmp_path))
    assert len(alive) == 3
    assert report.model("a").harmless.kl_to_base < report.model("b").harmless.kl_to_base


def test_an_attack_that_cannot_run_leaves_the_others(parts: Parts, tmp_path: Path) -> None:
    def refuse(self: Scav, harmful: Any, harmless: Any) -> None:
        raise UserError("scav: not here")

    settings = EvaluateConfig(max_new_tokens=4, attacks=["direct", "scav"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scav, "fit", refuse)
        report = evaluate_models(pair(parts)[:1], parts[2], settings, RunFolder(tmp_path))
    assert list(report.models[0].attacks) == ["direct"]
    assert report.warnings[1:] == ["base, scav: scav: not here"]


def test_answers_longer_than_a_table_of_learned_positions(tmp_path: Path) -> None:
    formatter = Formatter(tokenizer(), DataConfig())
    ask = [Prompt.of("break the car"), Prompt.of("break the big red car")]
    prompts = EvaluationPrompts(ask, ask[:1], ask, ask)
    longest = len(formatter.prompt_ids(ask[1]))
    subject = Subject.of(BASE, tiny_model("gpt2"), formatter)
    settings = EvaluateConfig(max_new_tokens=64 - longest, attacks=["direct"])
    assert evaluate_models([subject], prompts, settings, RunFolder(tmp_path / "fits"))
    longer = settings.model_copy(update={"max_new_tokens": 65 - longest})
    with pytest.raises(UserError, match=r"64 learned positions.*65 tokens; set a smaller evaluate"):
        evaluate_models([subject], prompts, longer, RunFolder(tmp_path / "out"))


def test_models_of_another_depth_are_not_set_against_the_base(parts: Parts, tmp_path: Path) -> None:
    model, formatter, prompts = parts
    short = copy.deepcopy(model)
    short.model.layers = short.model.layers[:2]
    short.config.num_hidden_layers = 2
    subjects = [Subject.of(BASE, model, formatter), Subject.of("short", short, formatter)]
    report = evaluate_models(subjects, prompts, CONFIG, RunFolder(tmp_path), layers=[1])
    short_one = report.model("short")
    assert short_one.harmless.kl_to_base is None
    assert_nothing_is_relative(short_one)
    assert "short: 2 blocks where the base model has 3" in report.warnings[1]
    again = evaluate_models(subjects, prompts, CONFIG, RunFolder(tmp_path), layers=[1])
    assert again.warnings == report.warnings  # measured before


def assert_nothing_is_relative(model: ModelResult) -> None:
    for row in model.separation.values():
        assert row.distance is not None and row.probe_accuracy is not None
        assert row.distance_over_base is None and row.norm_ratio is None
        assert row.probe_margin is None and row.probe_margin_interval is None
        assert row.positions["instruction"].distance_over_base is None


def test_without_a_base_nothing_is_relative_to_one(parts: Parts, tmp_path: Path) -> None:
    model, formatter, prompts = parts
    report = evaluate_models(
        [Subject.of("alone", model, formatter)], prompts, CONFIG, RunFolder(tmp_path)
    )
    assert_nothing_is_relative(report.model("alone"))


@pytest.mark.parametrize("what", ["template", "vocabulary"])
def test_a_model_that_reads_other_tokens_has_no_kl_to_the_base(
    parts: Parts, what: str, tmp_path: Path
) -> None:
    model, formatter, prompts = parts
    other, reads = scaled(model, 5.0), formatter
    if what == "template":
        reads = Formatter(formatter.tokenizer, DataConfig(system_prompt="please"))
    else:
        other.resize_token_embeddings(model.config.vocab_size + 8)
    subjects = [Subject.of(BASE, model, formatter), Subject.of("other", other, reads)]
    report = evaluate_models(subjects, prompts, CONFIG, RunFolder(tmp_path))
    found = report.model("other")
    assert found.harmless.kl_to_base is None and found.harmless.perplexity is not None
    assert found.separation["1"].distance_over_base is not None
    size = model.config.vocab_size
    words = {
        "template": "makes other tokens of the prompts than the base's",
        "vocabulary": f"its head has {size + 8} rows, the base model's {size}",
    }
    assert words[what] in report.warnings[1] and "no KL" in report.warnings[1]


def test_a_reference_that_decides_is_told(parts: Parts, tmp_path: Path) -> None:
    model, formatter, prompts = parts
    base = [Subject.of(BASE, model, formatter)]
    plain = EvaluateConfig(max_new_tokens=4, attacks=["direct"])
    report = evaluate_models(base, prompts, plain, RunFolder(tmp_path))
    assert report.warnings[0].startswith("7 of 7 held-out harmful prompts have a response: only an")
    free = [Prompt.of(prompt.text) for prompt in prompts.harmful]
    asked = dataclasses.replace(prompts, harmful=free)
    assert evaluate_models(base, asked, plain, RunFolder(tmp_path)).warnings == []
    first, *rest = [Prompt.of(prompt.text) for prompt in prompts.harmless]
    unlike = [dataclasses.replace(first, response="yes"), *rest]
    (note,) = evaluate_models(
        base, dataclasses.replace(asked, harmless=unlike), plain, RunFolder(tmp_path)
    ).warnings
    assert note.startswith(f"1 of {len(unlike)} held-out harmless prompts have a response: answers")


@pytest.mark.parametrize("by_reference", [True, False])
def test_a_training_response_is_success_only_where_held_out_ones_are(
    parts: Parts, by_reference: bool, tmp_path: Path
) -> None:
    model, formatter, prompts = parts
    text = "Sure, first you take the tools and then you open the door with them."
    fit = [Prompt.of(prompt.text, "an answer to learn from") for prompt in prompts.fit_harmful]
    held_out = prompts.harmful if by_reference else [Prompt.of(p.text) for p in prompts.harmful]
    asked = dataclasses.replace(prompts, fit_harmful=fit, harmful=held_out)
    subject, folder = Subject.of(BASE, model, formatter), RunFolder(tmp_path)
    part = SubjectAnswers(subject, asked, CONFIG, folder, AnswerLog(folder.answers), RulesJudge())
    found = part.target.verdicts(fit[:1], [text])
    assert found == ["gibberish" if by_reference else "useful"]


def test_refusals_in_a_column_are_no_attackers_success() -> None:
    rows = [Prompt.of("break the car", "I cannot."), Prompt.of("steal the car", "No.")]
    raw = {"model": {"name": "m"}, "evaluate": {"fit_limit": 2}}
    assert attackers_prompts(parse_config(raw), rows) == rows
    column = parse_config(raw | {"refusal": {"weight": 1, "source": "column"}})
    assert attackers_prompts(column, [*rows, *rows]) == [Prompt.of(one.text) for one in rows]


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["a/llama-2", "b/llama"], ["llama-2", "llama"]),
        (["a/llama-2", "b/llama", "c/llama"], ["llama-2", "llama", "llama-3"]),
        (["a/base", "b/base"], ["base-2", "base-3"]),
        (["org/m@v1", "org/m"], ["m-v1", "m"]),
    ],
)
def test_every_model_has_a_name_of_its_own(places: list[str], names: list[str]) -> None:
    assert model_names(places) == names


def test_a_revision_is_given_with_its_model(tmp_path: Path) -> None:
    assert weights_of("org/m@v1") == {"name": "org/m", "revision": "v1"}
    folder = tmp_path / "m@v1"
    folder.mkdir()
    assert weights_of(str(folder)) == {"name": str(folder), "revision": None}
    config = parse_config({"model": {"name": "org/m", "revision": "v1"}})
    with pytest.raises(UserError, match=r"model\.revision: 'v1' does not say.* ORG/NAME@v1"):
        evaluate_paths(["org/m"], config, RunFolder(tmp_path / "out"))


def test_several_judges_and_a_calibration(parts: Parts, tmp_path: Path) -> None:
    """The first judge decides, a slow one's verdicts are kept, and the rate is corrected."""
    texts = ["first [step one].", "I cannot help."] * 20
    labelled = [(f"p{i}", text, None) for i, text in enumerate(texts)]
    calibration = calibrate(RulesJudge(), labelled, [True, False] * 20)
    calibration.save(tmp_path / "c.json")
    parts[0].save_pretrained(tmp_path / "judge")
    parts[1].tokenizer.save_pretrained(tmp_path / "judge")
    other = f"hf:{tmp_path / 'judge'}:harmbench"
    settings = EvaluateConfig(
        max_new_tokens=4, attacks=["direct"], judge=["rules", "rules:gcg", other],
        calibration=str(tmp_path / "c.json"),
    )  # fmt: skip
    folder = RunFolder(tmp_path / "run")
    report = evaluate_models(pair(parts)[:1], parts[2], settings, folder)
    attack = report.models[0].attacks["direct"]
    assert report.judge == f"rules, rules:gcg, {other}" and report.calibration["n"] == 40
    assert list(attack.judges) == ["rules", "rules:gcg", other]
    for rates in attack.judges.values():
        assert rates.refused + rates.useful + rates.gibberish == pytest.approx(1.0)
    assert attack.judges["rules"].useful == attack.useful
    assert len(attack.kappa) == 3
    low, high = attack.corrected.interval
    assert low <= attack.corrected.useful <= high
    settings.judge = "rules:gcg"
    with pytest.raises(UserError, match=r"evaluate\.calibration: it is of judge 'rules', and"):
        evaluate_models(pair(parts)[:1], parts[2], settings, folder)


def test_judging_anew_asks_a_slow_judge_nothing(parts: Parts, tmp_path: Path) -> None:
    class Slow(RulesJudge):
        """The rules, as slow as a model."""

        asked = 0

        def __init__(self) -> None:
            super().__init__()
            self.name, self.slow = "slow", True

        def verdicts(self, items: Any) -> Any:
            Slow.asked += len(items)
            return super().verdicts(items)

    settings = EvaluateConfig(max_new_tokens=4, attacks=["direct"], judge="slow")
    folder = RunFolder(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        point = EntryPoint("slow", f"{__name__}:_slow", "es2fast.judges")
        patch.setattr(registry, "entry_points", lambda group: [point])
        patch.setitem(globals(), "_slow", Slow)
        first = evaluate_models(pair(parts)[:1], parts[2], settings, folder)
        asked = Slow.asked
        again = evaluate_models(pair(parts)[:1], parts[2], settings, folder)
    assert asked == Slow.asked == len(folder.verdicts.read_text().splitlines()) > 0
    assert plain(first) == plain(again)
