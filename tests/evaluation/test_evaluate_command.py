"""`mindvl evaluate` and `mindvl generate` as one calls them, on a tiny model saved as a Hugging Face folder."""

import contextlib
import io
import json
import re
import shutil

import pytest

from mindvl_jax.cli import main as cli
from mindvl_jax.core.files import read_jsonl
from mindvl_jax.evaluation import evaluate as evaluation
from mindvl_jax.inference import backends as bridge
from mindvl_jax.inference import programs


@pytest.fixture(scope="module")
def evaluated(model_folder, benchmark_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert (
            cli.main(
                [
                    "evaluate",
                    "--weights",
                    str(model_folder),
                    "--data",
                    str(benchmark_folder),
                    "--tasks",
                    "docvqa_val,chartqa_test",
                    "--out",
                    str(out),
                    "--batch",
                    "4",
                    "--max-new-tokens",
                    "3",
                ]
            )
            == 0
        )
    (out / "printed.txt").write_text(printed.getvalue())
    return out


def test_evaluation_writes_predictions_scores_and_pages(evaluated):
    scores = json.loads((evaluated / "scores.json").read_text())
    assert set(scores) == {"docvqa_val", "chartqa_test"}
    assert {"score", "ci95", "n", "language_only", "metric"} <= set(scores["docvqa_val"])
    rows = read_jsonl(evaluated / "docvqa_val.jsonl")
    assert len(rows) == 12 and sum(row["language_only"] for row in rows) == 6
    page = (evaluated / "docvqa_val.html").read_text()
    assert page.count("data:image/png;base64") == 6 and "which number 3?" in page
    mean = sum(result["score"] for result in scores.values()) / 2
    assert f"mean of 2 tasks: {mean:.4f}" in (evaluated / "printed.txt").read_text()
    index = (evaluated / "index.html").read_text()
    assert 'href="docvqa_val.html"' in index and not re.search(r'src="(?!data:)', index)


def test_an_interrupted_evaluation_asks_only_what_is_missing(
    evaluated, model_folder, benchmark_folder, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "again"
    shutil.copytree(evaluated, out)
    lines = (out / "chartqa_test.jsonl").read_text().splitlines(keepends=True)
    (out / "chartqa_test.jsonl").write_text("".join(lines[:4]) + lines[4][:20])  # killed while it wrote the fifth line
    asked = []
    generate = evaluation.Generator.generate
    monkeypatch.setattr(
        evaluation.Generator,
        "generate",
        lambda self, requests, **rest: (
            asked.extend(request.id for request in requests) or generate(self, requests, **rest)
        ),
    )
    assert (
        cli.main(
            [
                "evaluate",
                "--weights",
                str(model_folder),
                "--data",
                str(benchmark_folder),
                "--tasks",
                "docvqa_val,chartqa_test",
                "--out",
                str(out),
                "--batch",
                "4",
                "--max-new-tokens",
                "3",
            ]
        )
        == 0
    )
    assert len(asked) == 12 - 4

    def key(row):
        return (row["id"], row["language_only"])

    assert sorted(read_jsonl(out / "chartqa_test.jsonl"), key=key) == sorted(
        read_jsonl(evaluated / "chartqa_test.jsonl"), key=key
    )
    assert json.loads((out / "scores.json").read_text()) == json.loads((evaluated / "scores.json").read_text())


def test_a_broken_picture_inside_a_benchmark_counts_as_wrong_and_is_told_while_the_others_are_answered(
    model_folder, draw_text, tmp_path, capsys
):
    import base64

    whole = base64.b64encode(draw_text("7")).decode()
    pictures = [whole, "not base64!", base64.b64encode(b"no picture").decode(), whole[:80]]
    rows = "".join(f"{index}\t{picture}\twhich number {index}?\t7\n" for index, picture in enumerate(pictures))
    (tmp_path / "DocVQA_VAL.tsv").write_text("index\timage\tquestion\tanswer\n" + rows)
    assert (
        cli.main(
            [
                "evaluate",
                "--weights",
                str(model_folder),
                "--data",
                str(tmp_path),
                "--tasks",
                "docvqa_val",
                "--out",
                str(tmp_path / "out"),
                "--batch",
                "4",
                "--max-new-tokens",
                "3",
                "--no-language-only",
            ]
        )
        == 0
    )
    assert "3 unreadable" in capsys.readouterr().out
    rows = {row["id"]: row for row in read_jsonl(tmp_path / "out" / "docvqa_val.jsonl")}
    assert rows["0"]["tokens"] > 0 and "error" not in rows["0"]
    assert all(rows[index]["prediction"] == "" and f"request {index}: " in rows[index]["error"] for index in "123")
    assert "3 samples could not be read and count as wrong" in (tmp_path / "out" / "docvqa_val.html").read_text()


def test_predictions_of_other_settings_are_not_used():
    def settings(**changes):
        return evaluation.Settings(**dict(max_new_tokens=3, min_pixels=784, max_pixels=12544) | changes)

    prints = {
        settings().fingerprint("w"),
        settings().fingerprint("v"),
        settings(max_new_tokens=4).fingerprint("w"),
        settings(min_pixels=3136).fingerprint("w"),
    }
    assert settings().fingerprint("w") == settings().fingerprint("w") and len(prints) == 4


def test_weights_are_the_same_after_an_evaluation_in_their_folder_but_not_after_training(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = evaluation.weights_identity(tmp_path)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "mme.json").write_text("{}")
    (tmp_path / "inference.json").write_text("{}")
    assert evaluation.weights_identity(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert evaluation.weights_identity(tmp_path) != before


def test_search_compares_settings_and_saves_the_best_with_the_model(model_folder, samples_file, tmp_path, capsys):
    weights = tmp_path / "weights"
    shutil.copytree(model_folder, weights)
    numbers = samples_file("searched", count=10)
    assert (
        cli.main(
            [
                "evaluate",
                "--weights",
                str(weights),
                "--tasks",
                f"numbers={numbers}",
                "--out",
                str(tmp_path / "out"),
                "--search",
                "min_pixels=12544",
                "--method",
                "grid",
                "--batch",
                "4",
                "--max-new-tokens",
                "2",
            ]
        )
        == 0
    )
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    assert len(found["numbers"]["trials"]) == 2 and found["numbers"]["held_out"]["n"] > 0
    low, high = found["numbers"]["held_out"]["gain_ci95"]
    assert low <= found["numbers"]["held_out"]["gain"] <= high
    assert "data:image/png" in (tmp_path / "out" / "search.html").read_text()
    best = found["all"]["best"]
    assert (weights / "inference.json").is_file() == (best != {"min_pixels": None, "max_pixels": None})


def test_generate_uses_the_saved_picture_sizes(model_folder, tmp_path):
    from mindvl_jax.inference.loading import open_for_inference

    weights = tmp_path / "weights"
    shutil.copytree(model_folder, weights)
    assert open_for_inference(weights).min_pixels == 784
    (weights / "inference.json").write_text('{"min_pixels": 6272}')
    opened = open_for_inference(weights)
    assert (opened.min_pixels, opened.max_pixels) == (6272, 784 * 16)


def test_generate_prints_an_answer_and_a_file_of_answers(model_folder, draw_text, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(draw_text("7"))
    assert (
        cli.main(
            [
                "generate",
                "--weights",
                str(model_folder),
                "--image",
                str(tmp_path / "a.png"),
                "--prompt",
                "What is it?",
                "--max-new-tokens",
                "5",
            ]
        )
        == 0
    )
    streamed = capsys.readouterr().out
    (tmp_path / "requests.jsonl").write_text(
        '{"id": "x", "prompt": "What is it?", "images": ["a.png"], "max_new_tokens": 5}\n'
    )
    assert (
        cli.main(
            [
                "generate",
                "--weights",
                str(model_folder),
                "--requests",
                str(tmp_path / "requests.jsonl"),
                "--out",
                str(tmp_path / "answers.jsonl"),
            ]
        )
        == 0
    )
    row = read_jsonl(tmp_path / "answers.jsonl")[0]
    assert row["id"] == "x" and row["text"].strip() == streamed.strip() and len(row["logprobs"]) == len(row["tokens"])


def test_the_chosen_backend_and_device_run_the_programs(model_folder, monkeypatch, capsys):
    # Which tokens the bridge's programs give is tested in tests/inference/test_bridge.py; compiling them once more
    # would take half a minute.
    opened_on, decoded = [], []

    class Recorded:
        def __init__(self, device):
            opened_on.append(device)

        def __getattr__(self, name):
            decoded.append(name)
            return getattr(programs, name)

    monkeypatch.setattr(bridge, "BridgePrograms", Recorded)
    asked = [
        "generate",
        "--weights",
        str(model_folder),
        "--prompt",
        "Go",
        "--n",
        "2",
        "--temperature",
        "1",
        "--seed",
        "3",
        "--max-new-tokens",
        "3",
    ]
    assert cli.main([*asked, "--backend", "npu_bridge", "--device", "cuda"]) == 0
    through_bridge = capsys.readouterr().out
    assert opened_on == ["cuda"] and "decode" in decoded
    assert cli.main(asked) == 0 and capsys.readouterr().out == through_bridge and len(opened_on) == 1
    assert through_bridge.startswith("[0]: ") and "\n[1]: " in through_bridge


def test_a_device_that_is_not_here_is_refused_before_the_weights_are_opened(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert (
        cli.main(["generate", "--weights", "nowhere", "--prompt", "x", "--backend", "npu_bridge", "--device", "cuda"])
        == 2
    )
    assert "device 'cuda' asked for, torch sees none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["evaluate", "--weights", "{model}", "--tasks", "docvq_val"], "did you mean 'docvqa_val'"),
        (["evaluate", "--weights", "{model}"], "no held-out tasks of their own"),
        (["evaluate", "--weights", "{data}", "--tasks", "docvqa_val", "--data", "{data}"], "config.json"),
        (["evaluate", "--weights", "nowhere", "--tasks", "docvqa_val", "--data", "{data}"], "no such folder"),
        (
            [
                "evaluate",
                "--weights",
                "{model}",
                "--tasks",
                "docvqa_val",
                "--data",
                "{data}",
                "--search",
                "max_tokens=3",
            ],
            "'max_tokens' cannot be searched",
        ),
        (
            ["evaluate", "--weights", "{model}", "--tasks", "docvqa_val", "--data", "{data}", "--limit", "0"],
            "--limit is 0",
        ),
        (["generate", "--weights", "{data}", "--prompt", "x"], "config.json"),
        (
            ["generate", "--weights", "{model}", "--prompt", "x", "--image", "missing.png"],
            "there is no file 'missing.png'",
        ),
        (["generate", "--weights", "{model}"], "either --prompt TEXT"),
        (["generate", "--weights", "{model}", "--prompt", "x", "--temperature", "-1"], "temperature is -1"),
        (["generate", "--weights", "{model}", "--prompt", "x", "--mesh", "rows=2"], "axes are data, fsdp, tensor"),
        (["generate", "--weights", "{model}", "--prompt", "x", "--min-pixels", "0"], "--min-pixels is 0"),
        (["generate", "--weights", "{model}", "--prompt", "x", "--device", "npu"], "add --backend npu_bridge"),
        (["evaluate", "--weights", "{model}", "--backend", "npu_bridge", "--mesh", "data=2"], "runs on one device"),
    ],
)
def test_bad_input_is_refused_with_one_clear_message(model_folder, benchmark_folder, capsys, arguments, message):
    filled = [argument.format(model=model_folder, data=benchmark_folder) for argument in arguments]
    assert cli.main(filled) == 2
    assert message in capsys.readouterr().err


def test_averaging_two_folders_gives_a_model_that_opens(model_folder, tmp_path):
    import numpy as np

    from mindvl_jax.weights import open_model

    assert (
        cli.main(["average", "--weights", str(model_folder), str(model_folder), "--out", str(tmp_path / "mean")]) == 0
    )
    before, after = open_model(model_folder).parameters(), open_model(tmp_path / "mean").parameters()
    difference = max(np.abs(np.asarray(before[path]) - np.asarray(after[path])).max() for path in before)
    assert difference == 0, f"the mean of a model and itself differs by {difference}"  # x + x and / 2 are exact
    assert json.loads((tmp_path / "mean" / "average.json").read_text())["models"][0]["weight"] == 0.5
    assert (
        cli.main(["average", "--weights", str(model_folder), str(model_folder), "--out", str(tmp_path / "mean")]) == 2
    )


def test_a_second_task_joins_the_first_and_reused_answers_are_said(
    evaluated, model_folder, benchmark_folder, samples_file, tmp_path, capsys
):
    out = tmp_path / "joined"
    shutil.copytree(evaluated, out)
    (tmp_path / "rules.py").write_text(
        "def sevens(prediction, answers):\n    return {'share': 0.25 * ('1' in answers[0]), 'length': min(1, "
        "len(prediction) / 100)}\n"
    )
    numbers = samples_file("joined", count=4)
    asked = [
        "evaluate",
        "--weights",
        str(model_folder),
        "--data",
        str(benchmark_folder),
        "--out",
        str(out),
        "--batch",
        "4",
        "--max-new-tokens",
        "3",
    ]
    assert cli.main([*asked, "--tasks", f"docvqa_val,numbers={numbers}:{tmp_path / 'rules.py'}:sevens", "--json"]) == 0
    told = capsys.readouterr()
    assert "6 of 6 answers reused" in told.err
    printed = json.loads(told.out)[str(model_folder)]
    assert (
        set(printed) == {"docvqa_val", "numbers"}
        and printed["numbers"]["score"] == 0.25
        and printed["numbers"]["metric"] == "sevens"
    )
    assert set(json.loads((out / "scores.json").read_text())) == {"docvqa_val", "chartqa_test", "numbers"}
    index = (out / "index.html").read_text()
    assert all(f'href="{name}.html"' in index for name in ("docvqa_val", "chartqa_test", "numbers"))


def test_several_models_stand_in_one_table(evaluated, model_folder, benchmark_folder, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    assert (
        cli.main(
            [
                "evaluate",
                "--weights",
                str(model_folder),
                str(other),
                "--data",
                str(benchmark_folder),
                "--tasks",
                "docvqa_val",
                "--out",
                str(tmp_path / "out"),
                "--batch",
                "4",
                "--max-new-tokens",
                "3",
                "--no-language-only",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    table = printed[printed.rindex("\nmodels\n") :]
    assert table.count(" 0.") >= 4 and table.count("/other") == 1 and "docvqa_val" in table, table


@pytest.mark.parametrize(
    "task, message",
    [
        ("own={file}:anl", "did you mean 'anls'"),
        ("own={file}:no.py:f", "no such file"),
        ("own={rules}:{rules}:g", "has no function 'g'"),
        ("=x", "expected NAME=FILE"),
    ],
)
def test_a_metric_that_does_not_exist_is_refused_before_the_weights_are_opened(
    samples_file, tmp_path, capsys, task, message
):
    (tmp_path / "rules.py").write_text("def f(prediction, answers):\n    return 1\n")
    given = task.format(file=samples_file("refused", count=2), rules=tmp_path / "rules.py")
    assert cli.main(["evaluate", "--weights", "nowhere", "--tasks", given]) == 2
    assert message in capsys.readouterr().err


def test_metrics_of_ones_own_tasks_agree_with_the_benchmarks_rules():
    from mindvl_jax.config.schema import METRIC_NAMES
    from mindvl_jax.evaluation.items import Item
    from mindvl_jax.evaluation.metrics import METRICS, parse_task

    item = Item(id="a", messages=(), answers=("Paris", "paris, France"))
    number = Item(id="b", messages=(), answers=("100",))
    assert [METRICS["exact_match"](item, text) for text in ("Paris", "paris")] == [1, 0]
    assert (
        METRICS["exact_match_any_case"](item, "paris.")
        == METRICS["contains"](item, "It is paris")
        == METRICS["relaxed_accuracy"](number, "104")
        == 1
    )
    assert METRICS["relaxed_accuracy"](number, "106") == 0 and METRICS["anls"](item, "Pariz") == pytest.approx(0.8)
    assert METRICS["yes_no"](Item(id="c", messages=(), answers=("No",)), "no, it is not") == 1
    assert set(METRICS) == set(METRIC_NAMES)
    assert parse_task("a=C:/x/y.csv") == ("a", "C:/x/y.csv", "exact_match") and parse_task("a=b.csv:anls") == (
        "a",
        "b.csv",
        "anls",
    )
    assert parse_task("a=b.csv:dir/m.py:f") == ("a", "b.csv", "dir/m.py:f")
