"""Question-and-answer records, CSV, TSV and `datasets` folders become the same conversations as the shapes of chats."""

from __future__ import annotations

import base64
import csv
import json

import pyarrow as pa
import pytest
from data_toys import encoded, picture

from mindvl_jax.cli.main import main
from mindvl_jax.config.schema import ColumnMapping, SourceConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.questions import ACCEPTED
from mindvl_jax.data.record import sample_from_record
from mindvl_jax.data.sample import SampleError
from mindvl_jax.data.sources.readers import Source


def read(record, **columns):
    return sample_from_record(record, columns=ColumnMapping(**columns), media_root="/m", default_id="d", origin="o")


def turns(sample):
    return [(message.role, message.content) for message in sample.messages]


WANTED = [("user", "<image>What is it?"), ("assistant", "A cat.")]


@pytest.mark.parametrize("line", ACCEPTED)
def test_the_lines_that_a_refusal_shows_are_read_to_one_and_the_same_sample(line):
    sample = read(json.loads(line))
    assert turns(sample) == WANTED and [media.path for media in sample.images] == ["cat.png"]


@pytest.mark.parametrize("record, expected, answers", [
    ({"image": "c.png", "question": "Q <image>?", "answer": "A"}, [("user", "Q <image>?"), ("assistant", "A")], ("A",)),
    ({"images": ["a.png", "b.png"], "prompt": "Q", "response": "A"}, [("user", "<image><image>Q"), ("assistant", "A")],
    ("A",)),
    ({"instruction": "Translate.", "input": "chat", "output": "cat"},
    [("user", "Translate.\nchat"), ("assistant", "cat")], ("cat",)),
    ({"question": "Q", "answers": ["b", "a", "a"]}, [("user", "Q"), ("assistant", "a")], ("b", "a", "a")),
    ({"question": "Q", "answer": "a", "answers": ["a", "b", "b"]}, [("user", "Q"), ("assistant", "b")],
    ("a", "b", "b")),
    ({"question": "Q", "answers": [{"answer": "yes", "answer_confidence": "yes"}]},
    [("user", "Q"), ("assistant", "yes")], ("yes",)),
    ({"question": "How many?", "answer": 3, "system": "Count."},
    [("system", "Count."), ("user", "How many?"), ("assistant", "3")], ("3",)),
    ({"question": "Q"}, [("user", "Q")], ()),
])  # fmt: skip
def test_questions_and_answers_become_turns(record, expected, answers):
    sample = read(record)
    assert turns(sample) == expected and sample.answers == answers


def test_named_columns_are_the_ones():
    sample = read(
        {"text": "What is it?", "label": "A cat.", "path": "cat.png", "prompt": "not this"},
        question="text",
        answer="label",
        images="path",
    )
    assert turns(sample) == WANTED and sample.images[0].path == "cat.png"


@pytest.mark.parametrize("record, message", [
    ({"question": "a", "prompt": "b", "answer": "c"}, "'question' and 'prompt'; keep one"),
    ({"question": "a", "answer": "c", "label": "d"}, "'answer' and 'label'; keep one"),
    ({"question": "a", "answer": "B", "options": ["x", "y"]}, "'options' beside its question"),
    ({"question": "a", "answer": {"text": "b"}}, "must be text or a list of texts"),
    ({"question": ["a"], "answer": "b"}, "'question' must be text"),
])  # fmt: skip
def test_what_would_be_dropped_is_refused(record, message):
    with pytest.raises(SampleError, match=message):
        read(record)


@pytest.mark.parametrize("separator, name", [(",", "a.csv"), ("\t", "a.tsv")])
def test_tables_are_read_with_quotes_lists_and_lines_of_their_own(tmp_path, separator, name):
    (tmp_path / "cat.png").write_bytes(encoded(picture(1)))
    rows = [
        ["image", "question", "answer"],
        ["cat.png", f'What is{separator} "it"?\nSay.', "A cat."],
        ['["cat.png", "cat.png"]', "Same?", "yes"],
        [base64.b64encode(encoded(picture(2))).decode(), "q", "[a]"],
    ]
    with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    source = Source("a", SourceConfig(path=str(tmp_path / name)))
    assert len(source) == 3 and turns(source[0]) == [
        ("user", f'<image>What is{separator} "it"?\nSay.'),
        ("assistant", "A cat."),
    ]
    assert [len(source[index].images) for index in range(3)] == [1, 2, 1] and source[2].images[0].data[:4] == b"\x89PNG"
    assert source[2].messages[1].content == "[a]" and source.where(1).endswith("line 4")
    (tmp_path / name).write_text(f"image{separator}image\n")
    with pytest.raises(UserError, match="must name each column once"):
        Source("a", SourceConfig(path=str(tmp_path / name)))


def test_a_row_with_a_cell_too_many_is_refused_by_its_line(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\nq,a\nq,a,b\n")
    source = Source("a", SourceConfig(path=str(tmp_path / "a.csv")))
    assert turns(source[0])[1] == ("assistant", "a")
    with pytest.raises(SampleError, match="3 cells, the header 2"):
        source[1]


def test_a_folder_of_the_datasets_library_is_read_in_its_own_order(tmp_path):
    folder = tmp_path / "saved"
    (folder / "train").mkdir(parents=True)
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("question", pa.string()), ("answers", pa.list_(pa.string()))])
    for number in range(2):
        table = pa.Table.from_pylist(
            [
                {
                    "image": {"bytes": encoded(picture(number)), "path": None},
                    "question": f"q{number}",
                    "answers": ["a", "b"],
                }
            ],
            schema=schema,
        )
        with (
            pa.OSFile(str(folder / "train" / f"data-{number}.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, schema) as writer,
        ):
            writer.write_table(table)
    (folder / "train" / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-1.arrow"}, {"filename": "data-0.arrow"}]})
    )
    (folder / "train" / "dataset_info.json").write_text("{}")
    source = Source("a", SourceConfig(path=str(folder / "train")))
    assert [turns(source[index])[0][1] for index in range(2)] == ["<image>q1", "<image>q0"] and source[0].answers == (
        "a",
        "b",
    )
    with pytest.raises(UserError, match="holds the splits train; name one"):
        Source("a", SourceConfig(path=str(folder)))


def test_a_check_prints_reasons_and_accepted_lines_and_is_strict_when_asked(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n{"caption": "x"}\n')
    asked = ["data", "check", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "p.html"), "--tokenizer", "qwen3"]
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "data, malformed: 1; the first is data:1" in told and all(line in told for line in ACCEPTED)
    assert main([*asked, "--strict"]) == 1
    capsys.readouterr()
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["sources"][0]
    assert (found["kept"], found["skipped"]) == (1, {"malformed": 1})
