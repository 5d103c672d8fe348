"""Benchmarks at the end of a training run: the scores are those of `mindvl evaluate`, and stand-ins are called so."""

import json

import pytest

from mindvl_jax.config.schema import BENCHMARK_NAMES, BenchmarksConfig, Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_jsonl, write_json
from mindvl_jax.evaluation.benchmarks import BENCHMARKS, STANDINS_MARK
from mindvl_jax.evaluation.report import write_report
from mindvl_jax.evaluation.run import evaluate_run
from mindvl_jax.evaluation.run_benchmarks import check_benchmarks, evaluate_benchmarks
from mindvl_jax.inference import Answer, Generator

TASKS = ("docvqa_val", "mme", "mmbench_dev_en", "mmmu_dev_val")


def config_of(opened, tokenizer, folder) -> Config:
    phase = dict(
        name="sft",
        mixture=[{"source": "none"}],
        steps=1,
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
            data={"sources": {"none": {"path": "none.parquet"}}},
            training={"phases": [{**phase, "name": "warmup"}, phase]},
            evaluation={
                "benchmarks": {"folder": str(folder), "tasks": TASKS, "max_new_tokens": 2, "max_samples": 4},
                "batch": 4,
            },
        )
    )


@pytest.fixture(scope="module")
def marked(benchmark_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("marked")
    for file in benchmark_folder.iterdir():
        (folder / file.name).symlink_to(file)
    write_json(folder / STANDINS_MARK, {"what": "They are not the benchmarks <3"})
    return folder


@pytest.fixture(scope="module")
def run_dir(opened, tokenizer, marked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = config_of(opened, tokenizer, marked)
    evaluate_run(config, opened.model, 1, "warmup", folder)
    assert "benchmarks" not in json.loads((folder / "scores.json").read_text()), (
        "benchmarks are scored at the end of the run only"
    )
    evaluate_run(config, opened.model, 2, "sft", folder)
    return folder


def test_every_name_that_a_configuration_takes_is_a_benchmark_and_the_other_way_round():
    assert set(BENCHMARK_NAMES) == set(BENCHMARKS)


def test_scores_carry_interval_blind_score_and_what_the_benchmark_adds(run_dir):
    found = json.loads((run_dir / "scores.json").read_text())["benchmarks"]
    assert found["standins"].startswith("They are not") and list(found["tasks"]) == list(TASKS)
    for name, task in found["tasks"].items():
        assert task["title"].endswith("(stand-in)") and task["errors"] == 0
        assert task["ci95"][0] <= task["score"] <= task["ci95"][1] and 0 <= task["language_only"] <= 1, name
        assert len(read_jsonl(run_dir / "predictions" / "sft" / "benchmarks" / f"{name}.jsonl")) == task["n"] == 4
    assert {"mme_points", "language_only_summary"} <= set(found["tasks"]["mme"]) and "circular_accuracy" in found[
        "tasks"
    ]["mmbench_dev_en"]


def test_the_report_shows_them_apart_with_pictures_and_says_that_they_are_stand_ins(run_dir):
    page = write_report(run_dir).read_text()
    for part in (
        "Stand-in benchmark sets</h2>",
        "They are not the benchmarks &lt;3",
        "DocVQA (stand-in)",
        "MME (stand-in)",
        "circular accuracy",
        "which number",
    ):
        assert part in page, part
    assert page.count("<img") >= len(TASKS)


def test_answers_meet_their_own_questions_and_pictures_are_taken_away_for_the_blind_score(
    opened, marked, tmp_path, monkeypatch
):
    asked = []

    def answers(self, requests, **_):
        asked.extend(requests)
        return [
            Answer(
                id=r.id,
                sample=0,
                text=("Yes" if "Is it Yes" in r.messages[-1]["content"] else "No") if r.images else "No",
                tokens=(1,),
                logprobs=(0.0,),
                finish="stop",
                prompt_tokens=1,
            )
            for r in requests
        ]

    monkeypatch.setattr(Generator, "generate", answers)
    found = evaluate_benchmarks(
        Generator(opened),
        BenchmarksConfig(folder=str(marked), tasks=("docvqa_val", "mme", "ai2d_test"), max_new_tokens=20),
        tmp_path,
        language_only=True,
    )
    assert {name: task["score"] for name, task in found["tasks"].items()} == {"docvqa_val": 0, "mme": 1, "ai2d_test": 0}
    assert found["tasks"]["mme"]["mme_points"] == 400 and found["tasks"]["mme"]["language_only"] == 0.5
    assert {request.sampling.max_new_tokens for request in asked} == {16, 20}, (
        "a benchmark's own bound holds where it is lower"
    )


def test_files_that_are_no_stand_ins_are_not_called_so(opened, benchmark_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Generator,
        "generate",
        lambda self, requests, **_: [
            Answer(id=r.id, sample=0, text="", tokens=(), logprobs=(), finish="stop", prompt_tokens=1) for r in requests
        ],
    )
    found = evaluate_benchmarks(
        Generator(opened),
        BenchmarksConfig(folder=str(benchmark_folder), tasks=("mme",), max_samples=2),
        tmp_path,
        language_only=False,
    )
    assert found["standins"] is None and found["tasks"]["mme"]["title"] == "MME" and found["tasks"]["mme"]["n"] == 2


@pytest.mark.parametrize(
    "tasks, message",
    [(("docvqa_vall",), "did you mean 'docvqa_val'"), (("mme", "mme"), "mme more than once"), ((), "at least 1")],
)
def test_names_that_cannot_be_scored_are_refused_with_the_configuration(tasks, message):
    with pytest.raises(ValueError, match=message):
        BenchmarksConfig(folder="anywhere", tasks=tasks)


def test_missing_files_and_missing_columns_are_all_named_before_the_run(benchmark_folder, tmp_path):
    (tmp_path / "mme.tsv").write_text("index\tquestion\n1\twhy?\n")
    (tmp_path / "docvqa_val.tsv").write_text("index\tquestion\tanswer\timage\n")
    with pytest.raises(UserError) as refused:
        check_benchmarks(BenchmarksConfig(folder=str(tmp_path), tasks=("mme", "docvqa_val", "ai2d_test")))
    lines = str(refused.value).split("\n")
    assert (
        "lacks the columns answer, category, image" in lines[0]
        and "no rows" in lines[1]
        and "no file of AI2D" in lines[2]
    ), lines
    check_benchmarks(BenchmarksConfig(folder=str(benchmark_folder), tasks=TASKS))
