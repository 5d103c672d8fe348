"""An evaluation gives the same predictions on any number of devices, also when it is interrupted and continued on
others.
"""

import json

import pytest

from mindvl_jax.cli import main as cli
from mindvl_jax.core.files import read_jsonl
from mindvl_jax.evaluation import evaluate as evaluation


@pytest.fixture(scope="module")
def evaluate(model_folder, benchmark_folder):
    def run(out, *options):
        return cli.main(
            [
                "evaluate",
                "--weights",
                str(model_folder),
                "--data",
                str(benchmark_folder),
                "--tasks",
                "docvqa_val,textvqa_val",
                "--out",
                str(out),
                "--batch",
                "8",
                "--max-new-tokens",
                "6",
                "--no-language-only",
                *options,
            ]
        )

    return run


def test_begun_on_one_device_killed_and_finished_on_eight_it_predicts_what_one_device_does(
    evaluate, tmp_path, monkeypatch
):
    """Two devices against one: tests/inference/test_devices.py."""
    assert evaluate(tmp_path / "one") == 0
    add, added = evaluation.Predictions.add, []

    def dies_after_three(self, item, *rest):
        if len(added) == 3:
            raise KeyboardInterrupt
        added.append(item.id)
        add(self, item, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(evaluation.Predictions, "add", dies_after_three)
        assert evaluate(tmp_path / "spread") == 130  # interrupted
    assert evaluate(tmp_path / "spread", "--mesh", "data=2,fsdp=2,tensor=2") == 0
    for task, count in (("docvqa_val", 6), ("textvqa_val", 3)):
        one, spread = (
            {row["id"]: row["prediction"] for row in read_jsonl(tmp_path / folder / f"{task}.jsonl")}
            for folder in ("one", "spread")
        )
        assert one == spread and len(one) == count
        assert task != "docvqa_val" or len(set(one.values())) > 1, (
            "every picture has the same answer: the comparison proves little"
        )
        assert len(read_jsonl(tmp_path / "spread" / f"{task}.jsonl")) == count, "a finished sample was asked again"
    scores = [json.loads((tmp_path / folder / "scores.json").read_text()) for folder in ("one", "spread")]
    assert scores[0] == scores[1]
