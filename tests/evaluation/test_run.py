import io
import json
import math
import re

import pytest
import yaml

from mindvl_jax.cli.run_hooks import RunHooks
from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_jsonl
from mindvl_jax.core.progress import LogConsole
from mindvl_jax.evaluation import run as evaluation_run
from mindvl_jax.evaluation.curves import charts
from mindvl_jax.evaluation.images import SHOWN
from mindvl_jax.evaluation.report import write_report
from mindvl_jax.evaluation.run import evaluate_run


@pytest.fixture(scope="module")
def config(opened, samples_file, tokenizer):
    numbers = samples_file("numbers", broken=(5,))
    (numbers.parent / "manifest.json").write_text(json.dumps({"blind": {"numbers": 0.125}}))
    phase = dict(
        mixture=[{"source": "numbers"}],
        steps=10,
        rows=1,
        sequence_length=64,
        patches_per_row=64,
        learning_rate=1e-3,
        min_pixels=784,
        max_pixels=784 * 8,
    )
    return Config.model_validate(
        dict(
            run={"dir": "unused"},
            model=opened.model.config.model_dump(),
            tokenizer={"path": str(tokenizer._file)},
            data={"sources": {"numbers": {"path": str(numbers)}}},
            training={"phases": [{"name": "warmup", **phase}, {"name": "sft", **phase}]},
            evaluation={
                "tasks": [{"name": "numbers", "source": {"path": str(numbers)}, "max_new_tokens": 4}],
                "phase_samples": 10,
                "batch": 4,
                "after_phases": True,
            },
        )
    )


@pytest.fixture(scope="module")
def run_dir(config, opened, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    evaluate_run(config, opened.model, 10, "warmup", folder)
    evaluate_run(config, opened.model, 20, "sft", folder)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, 21):
            loss = None if step == 7 else 4 / math.sqrt(step)
            file.write(
                json.dumps(
                    {
                        "step": step,
                        "phase": "warmup" if step <= 10 else "sft",
                        "loss": loss,
                        "grad_norm": 1 / step,
                        "learning_rate": 1e-3,
                        "tokens": 500,
                        "samples": 9,
                        "tokens_per_second": 1000.0,
                        "step_seconds": 0.5,
                        "skipped_steps": int(step >= 7),
                        "tokens_total": 500 * step,
                        "samples_total": 9 * step,
                        "seconds_total": 0.5 * step,
                    }
                )
                + "\n"
            )
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return folder


def test_scores_hold_the_last_evaluation_and_every_phase(run_dir):
    scores = json.loads((run_dir / "scores.json").read_text())
    task = scores["tasks"]["numbers"]
    assert (scores["phase"], scores["step"]) == ("sft", 20)
    assert task["n"] == 24 and task["by_phase"]["warmup"]["n"] == 10 and task["by_phase"]["sft"]["step"] == 20
    assert task["ci95"][0] <= task["score"] <= task["ci95"][1]
    assert 0 <= task["language_only"] <= 1
    assert task["blind_majority"] == 0.125


def test_a_picture_that_cannot_be_read_counts_as_wrong_and_is_told(run_dir):
    rows = read_jsonl(run_dir / "predictions" / "sft" / "numbers.jsonl")
    broken = [row for row in rows if "error" in row]
    assert [row["id"] for row in broken] == ["5:s5"] and broken[0]["score"] == 0
    assert json.loads((run_dir / "scores.json").read_text())["tasks"]["numbers"]["errors"] == 1


def test_predictions_stand_beside_question_and_answers_with_pictures_of_some(run_dir):
    rows = read_jsonl(run_dir / "predictions" / "sft" / "numbers.jsonl")
    assert len(rows) == 24 and {"id", "question", "answers", "prediction", "score", "language_only_prediction"} <= set(
        rows[0]
    )
    shown = [row for row in rows if row.get("shown")]
    assert 0 < len(shown) <= SHOWN
    assert all((run_dir / "predictions" / "sft" / picture).is_file() for row in shown for picture in row["shown"])


def test_the_score_is_the_share_of_exact_answers(config, opened, tmp_path, monkeypatch):
    def answers(self, requests, **_):
        from mindvl_jax.inference import Answer

        def say(request):
            return (
                str(100 + int(request.id.split(":")[0]))
                if int(request.id.split(":")[0]) % 3 == 0 and request.images
                else "no"
            )

        return [
            Answer(id=r.id, sample=0, text=say(r), tokens=(1,), logprobs=(0.0,), finish="stop", prompt_tokens=1)
            for r in requests
        ]

    monkeypatch.setattr(evaluation_run.Generator, "generate", answers)
    console = LogConsole(file=io.StringIO())
    scores = evaluate_run(config, opened.model, 20, "sft", tmp_path, console)
    assert re.search(r"numbers │ exact match │ 0\.333 │ .* │ +24 │ +0\.000 │ +0\.125 ", console.file.getvalue()), (
        console.file.getvalue()
    )
    assert scores["tasks"]["numbers"]["score"] == pytest.approx(8 / 24, abs=1e-4)
    assert scores["tasks"]["numbers"]["language_only"] == 0


@pytest.mark.parametrize("metric", ["contains", "{folder}/mine.py:longer"])
def test_a_task_is_scored_by_the_metric_that_it_names(config, opened, tmp_path, metric):
    (tmp_path / "mine.py").write_text("def longer(prediction, answers):\n    return float(len(prediction) >= 0)\n")
    data = config.model_dump()
    data["evaluation"]["tasks"][0].update(metric=metric.format(folder=tmp_path), max_samples=3)
    changed = Config.model_validate(data)
    assert RunHooks(changed).problems() == []
    task = evaluate_run(changed, opened.model, 20, "sft", tmp_path)["tasks"]["numbers"]
    assert task["metric"] == metric.rpartition(":")[2] and task["score"] == (1.0 if "mine" in metric else 0.0)


@pytest.mark.parametrize("metric", ["exact", "", "x.py", "a.py:b c", "m.py:\0", "../x.py:"])
def test_a_metric_that_is_not_there_is_refused_when_the_configuration_is_read(config, metric):
    data = config.model_dump()
    data["evaluation"]["tasks"][0]["metric"] = metric
    with pytest.raises(ValueError, match="no such metric|control characters"):
        Config.model_validate(data)
    data["evaluation"]["tasks"][0]["metric"] = "nowhere.py:f"
    assert "there is no such file" in RunHooks(Config.model_validate(data)).problems()[0]


def test_a_missing_task_file_is_refused_by_name(config, opened, tmp_path):
    data = config.model_dump()
    data["evaluation"]["tasks"][0]["source"]["path"] = str(tmp_path / "nothing.parquet")
    with pytest.raises(UserError, match="nothing.parquet"):
        evaluate_run(Config.model_validate(data), opened.model, 20, "sft", tmp_path)


def test_the_report_is_one_file_with_scores_gains_curves_pictures_and_config(run_dir):
    page = write_report(run_dir).read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page loads something from elsewhere"
    for part in (
        "numbers",
        "Gain of each phase",
        "warmup",
        "data:image/png;base64",
        "Which number?",
        "mrope_section",
        "1 of 24 samples of numbers",
        "1 steps had a loss or gradient",
    ):
        assert part in page, part
    assert page.count("<img") >= 5 and page.count('<script type="application/json">') == 4


def test_other_peoples_text_cannot_become_markup(tmp_path):
    (tmp_path / "predictions" / "p").mkdir(parents=True)
    (tmp_path / "scores.json").write_text(
        json.dumps(
            {
                "phase": "p",
                "tasks": {"t": {"metric": "exact_match", "score": 0.0, "ci95": [0, 0.5], "n": 1, "by_phase": {}}},
            }
        )
    )
    (tmp_path / "predictions" / "p" / "t.jsonl").write_text(
        json.dumps(
            {
                "id": "1",
                "question": "<script>alert(1)</script>",
                "answers": ["&"],
                "prediction": "<b>",
                "score": 0,
                "shown": [],
            }
        )
        + "\n"
    )
    page = write_report(tmp_path).read_text()
    assert "<script>alert" not in page and "&lt;script&gt;" in page


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path)


def test_every_source_of_the_loss_has_a_line_that_stays_in_its_phase(tmp_path):
    sources = [f"source{number}" for number in range(12)]
    rows = []
    for step in range(1, 121):
        first = step <= 60
        own = sources[:6] if first else sources[6:]
        rows.append(
            {
                "step": step,
                "phase": "a" if first else "b",
                "loss": 9.0 if first else 1.0,
                **{f"loss/{name}": 9.0 if first else 1.0 for name in own},
            }
        )
    rows[9]["validation_loss"], rows[99]["validation_loss"] = 8.0, 2.0
    chart = charts(rows)[0]
    lines = {line["name"]: line for line in chart["lines"]}
    assert set(lines) == {"loss", "validation", *sources}
    assert (
        set(lines["source0"]["values"]) == {9.0}
        and max(lines["source0"]["steps"]) == 60
        and min(lines["source11"]["steps"]) == 61
    )
    assert {value for value in lines["loss"]["values"] if value is not None} == {9.0, 1.0}, (
        "smoothing does not cross the border"
    )
    assert lines["validation"]["values"] == [8.0, None, 2.0] and [phase["name"] for phase in chart["phases"]] == [
        "a",
        "b",
    ]


def test_wrong_answers_come_first_and_scores_of_other_samples_are_not_coloured(run_dir):
    page = write_report(run_dir).read_text()
    answers = page[page.index('id="answers"') :]
    kinds = re.findall(r'class="sample (wrong|partly|)"', answers)
    assert kinds == sorted(kinds, key=["wrong", "partly", ""].index)
    gains = page[page.index("Gain of each phase") :]
    assert not re.search(r'<small class="(up|down)">', gains[: gains.index("</table>")]), "10 samples against 24"


def test_charts_show_mfu_only_where_the_devices_peak_is_known():
    rows = [{"step": step, "phase": "a", "loss": 1.0, "mfu": None, "mfu_language": None} for step in range(1, 4)]
    assert not [chart for chart in charts(rows) if chart["title"].startswith("MFU")]
    known = [row | {"mfu": 0.4, "mfu_language": 0.3} for row in rows]
    (chart,) = (chart for chart in charts(known) if chart["title"].startswith("MFU"))
    assert {line["name"]: line["values"][-1] for line in chart["lines"]} == {"all": 0.4, "language": 0.3}
