"""Contents of trackers after a run: the files of CSV and TensorBoard, and, where they are installed, of the real W&B,
MLflow and SwanLab without a network.
"""

import csv
import json
import time

import pytest
from PIL import Image

from mindvl_jax.training.loggers import Csv, MLflow, ShownAnswer, SwanLab, TensorBoard, WandB, answers_of, markdown


@pytest.fixture
def answers(tmp_path):
    """Two answers as a run keeps them, one with an image."""
    folder = tmp_path / "predictions" / "sft"
    (folder / "digits").mkdir(parents=True)
    Image.new("RGB", (8, 8), (200, 10, 10)).save(folder / "digits" / "0.png")
    rows = [
        {"id": "a", "question": "Read.", "answers": ["7"], "prediction": "7", "score": 1.0, "shown": []},
        {"id": "b", "question": "Read|it.", "answers": ["12", "13"], "prediction": "<b>", "score": 0.0}
        | {"shown": ["digits/0.png"]},
        {"id": "c", "question": "Not kept.", "answers": ["1"], "prediction": "2", "score": 0.0},
    ]  # fmt: skip
    (folder / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return answers_of(tmp_path, "sft", ["digits", "no such task"])


def test_answers_come_with_their_images_wrong_ones_first(answers, tmp_path):
    assert answers == [
        ShownAnswer("digits", "Read|it.", "<b>", "12 / 13", 0.0, tmp_path / "predictions/sft/digits/0.png"),
        ShownAnswer("digits", "Read.", "7", "7", 1.0),
    ]
    assert r"Read\|it." in markdown(answers) and r"\<b\>" in markdown(answers), "other people's text is escaped"


def test_csv_holds_scores_and_answers_and_a_resumed_run_writes_its_steps_again(answers, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    for first_step in (0, 4):
        tracker = Csv(tmp_path, first_step)
        tracker.log({"loss": 2.0, "score/digits": 0.5}, 5)
        tracker.show(answers, 5)
        tracker.close()
    read = {name: list(csv.DictReader(open(tmp_path / name))) for name in ("scores.csv", "answers.csv")}
    assert read["scores.csv"] == [{"step": "5", "score": "score/digits", "value": "0.5"}]
    assert [(row["step"], row["prediction"], row["score"]) for row in read["answers.csv"]] == [
        ("5", "<b>", "0.0"),
        ("5", "7", "1.0"),
    ]


def test_tensorboard_holds_answers_as_text_and_images(answers, tmp_path):
    tracker = TensorBoard(tmp_path, 0)
    tracker.show(answers, 5)
    tracker.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    assert b"answers/digits/text_summary" in content and b"answers/digits/0" in content and b"PNG" in content


def use(tracker, answers):
    tracker.log({"loss": 2.5, "loss/some source (a)": 1.5}, 1)
    tracker.log({"score/digits": 0.5}, 2)
    tracker.show(answers, 2)
    tracker.close()


def test_wandb_offline_keeps_numbers_and_answers(answers, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    use(WandB(tmp_path, "p", {"run": {"seed": 1}}), answers)
    (stored,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    until = time.monotonic() + 30  # its service writes after the run has ended
    while b"score/digits" not in (content := stored.read_bytes()) and time.monotonic() < until:
        time.sleep(0.2)
    assert b"score/digits" in content and b"loss/some source (a)" in content
    tables = list((tmp_path / "wandb").glob("offline-run-*/files/media/table/answers*.json"))
    assert len(tables) == 1 and json.loads(tables[0].read_text())["data"][0][1:] == list(answers[0].cells().values())
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/images/digits_*.png"))


def test_mlflow_in_a_folder_keeps_numbers_and_answers(answers, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path / 'mlruns'}")
    use(MLflow(tmp_path, "p", {"run": {"seed": 1}}), answers)
    client = mlflow.MlflowClient()
    run = client.get_run((tmp_path / "mlflow_id.txt").read_text().strip())
    assert run.data.metrics == {"loss": 2.5, "loss.some source _a_": 1.5, "score.digits": 0.5}
    stored = json.loads(next((tmp_path / "mlruns").rglob("step-000002.json")).read_text())
    assert stored["answers"][1] == answers[1].cells()
    assert list((tmp_path / "mlruns").rglob("000-digits/0.png"))


def test_swanlab_offline_keeps_numbers_and_answers(answers, tmp_path, monkeypatch):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    use(SwanLab(tmp_path, "p", {"run": {"seed": 1}}), answers)
    content = b"".join(file.read_bytes() for file in (tmp_path / "swanlab").rglob("*") if file.is_file())
    assert b"score/digits" in content and b"answers/digits" in content
