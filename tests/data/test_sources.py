"""Every kind of source, every way it can be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from es2fast.config import DataSource
from es2fast.data.prompts import Prompt, read_source
from es2fast.errors import UserError


def read(path, labelled=False, **options):
    return read_source(DataSource(source=str(path), **options), "data.harmful[0]", labelled)


def texts(path, **options):
    return [prompt.text for prompt in read(path, **options).prompts]


def write(path: Path, content: str, encoding="utf-8") -> Path:
    path.write_text(content, encoding=encoding)
    return path


def message(path, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **options)
    text = str(caught.value)
    assert "\n" not in text and text.startswith("data.harmful[0]: ")
    return text


def test_plain_text_has_a_prompt_per_line_and_skips_blank_ones(tmp_path):
    path = write(tmp_path / "p.list", "one two\n\n   \n three \n", encoding="utf-8-sig")
    assert texts(path) == ["one two", "three"]
    assert texts(path, limit=1) == ["one two"]


def test_csv_with_bom_index_column_quoted_newline_and_literal_null(tmp_path):
    content = ',prompt,other\n0,"one\ntwo, three",x\n1,null,y\n2,1e5,z\n'
    path = write(tmp_path / "p.csv", content, encoding="utf-8-sig")
    assert texts(path) == ["one\ntwo, three", "null", "1e5"]
    bom_on_prompt = write(tmp_path / "q.csv", "prompt\none\n", encoding="utf-8-sig")
    assert texts(bom_on_prompt) == ["one"]


def test_tsv(tmp_path):
    assert texts(write(tmp_path / "p.tsv", "id\tgoal\n1\ta, b\n")) == ["a, b"]


def test_csv_rows_longer_than_the_header_are_an_error(tmp_path):
    path = write(tmp_path / "p.csv", "prompt,x\none,1\ntwo, three,2\n")
    assert "row 2 has more cells than the header" in message(path)


def test_csv_with_an_unclosed_quote_is_an_error(tmp_path):
    path = write(tmp_path / "p.csv", 'prompt\n"one\ntwo\nthree\n')
    assert "not valid CSV" in message(path)


def test_csv_row_without_the_prompt_cell_is_named(tmp_path):
    path = write(tmp_path / "p.csv", "id,prompt\n1,one\n2\n")
    assert "row 2: column 'prompt' holds nothing; expected text" in message(path)


def test_jsonl_objects_and_strings(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"question": "one"}\n\n{"question": "two"}\n')
    assert texts(path) == ["one", "two"]
    assert texts(path, limit=1) == ["one"]
    assert texts(write(tmp_path / "s.jsonl", '"one"\n"two"\n')) == ["one", "two"]


@pytest.mark.parametrize(
    "value",
    [
        [{"goal": "one"}, {"goal": "two"}],
        ["one", "two"],
        {"version": 1, "data": [{"goal": "one"}, {"goal": "two"}]},
        {"goal": ["one", "two"], "id": [1, 2]},
        {"goal": ["one", "two"]},
    ],
)
def test_json_layouts(tmp_path, value):
    assert texts(write(tmp_path / "p.json", json.dumps(value))) == ["one", "two"]


def test_json_lines_under_the_name_json(tmp_path):
    assert texts(write(tmp_path / "p.json", '{"goal": "one"}\n{"goal": "two"}\n')) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.json", "{", "is not valid JSON"),
        ("p.json", '{"a": 1}', "holds a JSON dict without a list of rows"),
        ("p.json", "3", "holds a JSON int without a list of rows"),
        ("p.json", "[1]", "row 1 is a int"),
        ("p.json", "[]", "has no rows"),
        ("p.jsonl", '{"prompt": "one"}\n{"prompt"\n', "line 2 is not valid JSON"),
        ("p.jsonl", "[1, 2]\n", "line 1 is a list"),
        ("p.jsonl", "", "has no rows"),
        ("p.csv", "prompt\n", "has no rows"),
        ("p.txt", "\n \n", "has no rows"),
        ("p.txt", "a\0b\n", "is a binary file"),
        ("p.csv", 'prompt,x\n"  ",1\n', "has only blank prompts in column 'prompt'"),
        ("p.parquet", "no", "is not a readable Parquet file"),
        ("p.jsonl", '{"prompt": "one"}\n{"prompt": 3}\n', "row 2: column 'prompt' holds 3 (int)"),
        ("p.jsonl", '{"prompt": "one"}\n{"x": 3}\n', "row 2: column 'prompt' holds nothing"),
        ("p.jsonl", '{"id": 1, "title": "x"}\n', "set `column` to one of 'id', 'title'"),
    ],
)
def test_malformed_files(tmp_path, name, content, expected):
    assert expected in message(write(tmp_path / name, content))


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(b"prompt\nf\xfcr\n")
    assert "is not UTF-8 text" in message(path)


def test_a_file_that_cannot_be_read(tmp_path):
    path = write(tmp_path / "p.txt", "one\n")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("file permissions do not bind this user")
    assert "cannot be read (Permission denied)" in message(path)


def test_unknown_column_lists_the_columns_there_are(tmp_path):
    path = write(tmp_path / "p.csv", ",prompt,b\n0,one,x\n")
    assert "has no column 'c'; its columns are 'prompt', 'b'" in message(path, column="c")
    assert texts(path, column="b") == ["x"]


@pytest.mark.parametrize(
    "name",
    ["prompt", "goal", "Goal", "Behavior", "forbidden_prompt", "instruction", "question", "text"],
)
def test_recognised_columns(tmp_path, name):
    found = read(write(tmp_path / "p.csv", f"id,{name},note\n1,one,x\n"))
    assert found.column == name and found.prompts == [Prompt.of("one")]


def test_goal_comes_before_behavior(tmp_path):
    path = write(tmp_path / "p.csv", "Behavior,Goal\ntitle,one\n")
    assert texts(path) == ["one"]
    two_cases = write(tmp_path / "q.csv", "Goal,goal\ntitle,one\n")
    assert texts(two_cases) == ["one"]


def test_instruction_takes_its_input(tmp_path):
    rows = '{"instruction": "one", "input": "two"}\n{"instruction": "three", "input": ""}\n'
    assert texts(write(tmp_path / "p.jsonl", rows)) == ["one\n\ntwo", "three"]


@pytest.mark.parametrize(
    ("row", "column", "response"),
    [
        ({"prompt": "p", "response": "r", "answer": "a"}, "response", "r"),
        ({"prompt": "p", "completion": "r"}, "completion", "r"),
        ({"prompt": "p", "completion": [{"role": "assistant", "content": "r"}]}, "completion", "r"),
        ({"question": "p", "answer": 3}, None, None),
        ({"prompt": "p", "output": "r", "answer": "a"}, None, None),
        ({"prompt": "p", "response": " "}, "response", None),
        ({"prompt": "p", "response": None}, "response", None),
    ],
)
def test_responses(tmp_path, row, column, response):
    found = read(write(tmp_path / "p.jsonl", json.dumps(row)))
    assert found.response_column == column
    assert found.prompts[0].response == response


def test_a_response_that_is_no_text_is_named(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"prompt": "p", "response": 3}')
    assert "row 1: column 'response' holds 3 (int); expected text" in message(path)


def test_conversations_end_at_the_last_user_turn(tmp_path):
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": r, "content": c, "extra": None} for r, c in turns]
    found = read(write(tmp_path / "p.jsonl", json.dumps({"messages": messages})))
    prompt = found.prompts[0]
    assert prompt.turns == tuple(turns[:4])
    assert (prompt.text, prompt.response) == ("c", "d")
    unanswered = read(write(tmp_path / "q.jsonl", json.dumps({"messages": messages[:4]})))
    assert unanswered.prompts[0].response is None


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("text", "row 1: column 'messages' holds 'text' (str); expected a list of messages"),
        ([{"role": "user"}], "expected messages of the form {role, content}, both text"),
        (["user"], "expected messages of the form"),
        ([{"role": "system", "content": "x"}], "has no last user turn with text"),
        ([], "has no last user turn with text"),
    ],
)
def test_malformed_conversations(tmp_path, messages, expected):
    path = write(tmp_path / "p.jsonl", json.dumps({"messages": messages}))
    assert expected in message(path)


@pytest.mark.parametrize(
    ("harmful", "harmless"),
    [("harmful", "harmless"), ("unsafe", "safe"), (1, 0), ("1", "0"), (True, False), ("True", "f")],
)
def test_labels(tmp_path, harmful, harmless):
    rows = [{"prompt": "one", "label": harmful}, {"prompt": "two", "label": harmless}]
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    if harmless == "f":
        assert "column 'label' holds 'f'; expected harmful/harmless" in message(path, labelled=True)
    else:
        assert read(path, labelled=True).harmful == [True, False]


def test_unknown_labels_are_listed(tmp_path):
    path = write(tmp_path / "p.csv", "prompt,label\na,safe\nb,odd\nc,5\n")
    assert "holds '5', 'odd'; expected" in message(path, labelled=True)
    assert read(path, labelled=True, limit=1).labels == {"safe": 1}
    no_label = write(tmp_path / "q.csv", "prompt,kind\na,safe\n")
    assert "has no column 'label'; its columns are 'prompt', 'kind'" in message(
        no_label, labelled=True
    )


def saved(tmp_path: Path, form: str) -> Path:
    """harmless is class 1 here: only the class names tell the groups apart."""
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["harmful", "harmless"]),
            "other": datasets.Value("int64"),
        }
    )
    rows = {"prompt": ["one", "two", "three"], "label": [1, 0, 1], "other": [1, 2, 3]}
    data = datasets.Dataset.from_dict(rows, features=features)
    path = tmp_path / form
    if form == "parquet":
        path = tmp_path / "p.parquet"
        data.to_parquet(path)
    elif form == "dict":
        datasets.DatasetDict({"test": data}).save_to_disk(path)
    elif form == "files":
        path.mkdir()
        data.to_json(path / "test.jsonl")
    else:
        data.save_to_disk(path)
    return path


@pytest.mark.parametrize("form", ["dataset", "dict", "parquet"])
def test_saved_datasets_and_parquet(tmp_path, form):
    path = saved(tmp_path, form)
    found = read(path, labelled=True, split="test", limit=2)
    assert [p.text for p in found.prompts] == ["one", "two"]
    assert found.harmful == [False, True]
    assert "its columns are 'prompt', 'label', 'other'" in message(path, split="test", column="x")


def test_a_saved_dataset_without_a_known_column_names_those_it_has(tmp_path):
    datasets.Dataset.from_dict({"query": ["one"], "x": [1]}).save_to_disk(tmp_path / "set")
    assert "no column recognised as the prompt; set `column` to one of 'query', 'x'" in message(
        tmp_path / "set"
    )


def test_a_folder_of_data_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert texts(saved(tmp_path, "files"), split="test") == ["one", "two", "three"]


def test_folders_without_that_split_or_without_a_dataset(tmp_path):
    text = message(saved(tmp_path, "dict"), split="train")
    assert "has no split 'train'; it has test" in text
    (tmp_path / "empty").mkdir()
    assert "holds no dataset that could be loaded" in message(tmp_path / "empty")


@pytest.mark.parametrize("name", ["missing.csv", "no/such/file", "./missing", "/missing/x.json"])
def test_a_missing_path_never_reaches_the_hub(name):
    assert message(name).endswith(
        f"{name!r} is neither a file or folder nor a Hugging Face dataset id; check the path"
    )


def test_an_unknown_dataset_id_is_one_line_without_a_traceback():
    code = (
        "from es2fast.config import DataSource\n"
        "from es2fast.data.prompts import read_source\n"
        "from es2fast.errors import UserError\n"
        "try: read_source(DataSource(source='nobody/nothing:x'), 'data.harmful[0]')\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "neither a file or folder nor a dataset that could be loaded" in done.stdout
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr


# Which rows of a source


def labelled_rows(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"p{i}", "label": "safe" if i % 3 else "Unsafe", "level": i % 2}
        for i in range(12)
    ]
    return write(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def test_where_then_rows_then_limit(tmp_path):
    path = labelled_rows(tmp_path)
    safe = [f"p{i}" for i in range(12) if i % 3]
    assert texts(path, where={"label": "safe"}) == safe
    assert texts(path, where={"label": "SAFE", "level": 1}) == ["p1", "p5", "p7", "p11"]
    assert texts(path, where={"level": [1, 7], "label": ["unsafe"]}) == ["p3", "p9"]
    even, odd = (texts(path, where={"label": "safe"}, rows=part) for part in ("::2", "1::2"))
    assert sorted(even + odd) == sorted(safe) and even == safe[::2]
    assert texts(path, where={"label": "safe"}, rows="1::2", limit=2) == safe[1::2][:2]
    assert texts(path, rows="2:4") == ["p2", "p3"]


@pytest.mark.parametrize("odd", ["", "n/a", "-1"])
def test_a_row_without_a_label_does_not_hide_the_others(tmp_path, odd):
    rows = [f"p{i},{'safe' if i % 2 else 'unsafe'}" for i in range(6)]
    path = write(tmp_path / "p.csv", "\n".join(["prompt,Label", f"p9,{odd}", *rows]) + "\n")
    assert texts(path, side="harmless") == ["p1", "p3", "p5"]
    assert texts(path, side="harmful") == ["p0", "p2", "p4"]
    with pytest.raises(UserError, match="has 3 of 7 rows labelled 'unsafe' among the harmless"):
        read_source(DataSource(source=str(path)), "data.harmless[0]", group="harmless")


def test_numbered_classes_are_no_labels_of_sides(tmp_path):
    rows = "".join(f"p{i},{i % 3}\n" for i in range(9))
    path = write(tmp_path / "p.csv", "prompt,label\n" + rows)
    assert len(texts(path, side="harmless")) == 9
    assert read_source(DataSource(source=str(path)), "data.harmless[0]", group="harmless")


def test_several_answers_in_a_cell_are_no_response(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "one", "answer": ["a", "b"]}\n')
    assert read(path).prompts[0].response is None


def test_side_keeps_the_rows_of_one_label(tmp_path):
    path = labelled_rows(tmp_path)
    assert texts(path, side="harmless") == texts(path, where={"label": "safe"})
    assert texts(path, side="harmful") == texts(path, where={"label": "unsafe"})
    assert texts(path, side="harmless", rows="1::2") == texts(path, side="harmless")[1::2]
    assert texts(path, side="harmful", limit=2) == texts(path, side="harmful")[:2]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(f'{{"prompt": "p{i}", "label": "kind {i}"}}\n' for i in range(3)))
    assert texts(other, side="harmful") == ["p0", "p1", "p2"]  # labels of another kind
    text = message(path, side="harmless", where={"label": "unsafe"})
    assert "side" in text and "'unsafe'" in text


def test_where_reads_a_columnar_source_by_class_names_and_unknown_columns(tmp_path):
    names = datasets.ClassLabel(names=["safe", "unsafe"])
    features = datasets.Features({"prompt": datasets.Value("string"), "Verdict": names})
    data = {"prompt": ["a", "b", "c", "d"], "Verdict": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(data, features=features).save_to_disk(str(tmp_path / "saved"))
    assert texts(tmp_path / "saved", where={"Verdict": "safe"}, limit=2) == ["a", "c"]


def test_mistakes_in_choosing_rows_name_what_there_is(tmp_path):
    path = labelled_rows(tmp_path)
    text = message(path, where={"labl": "safe"})
    assert "where" in text and "'labl'" in text and "'prompt', 'label', 'level'" in text
    text = message(path, where={"label": "fine"})
    assert "label='fine'" in text and "'Unsafe', 'safe'" in text
    assert "leaves none of the 12 rows" in message(path, rows="30:")
    with pytest.raises(ValueError, match="rows"):
        DataSource(source="x", rows="odd")


def test_a_kind_stands_on_every_prompt(tmp_path):
    path = labelled_rows(tmp_path)
    kinds = [prompt.kinds for prompt in read(path, kind="borderline", limit=2).prompts]
    assert [found[0] for found in kinds] == [("kind", "borderline")] * 2
    assert ("label", "safe") in kinds[1]
