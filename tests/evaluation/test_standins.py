"""The stand-ins: both published forms hold the same questions, only held-out material is shown, and no score can pass
for the benchmark's.
"""

import io
import json

import numpy as np
import pytest
from PIL import Image

from examples.quickstart.standins import pictures
from examples.quickstart.standins.build import build
from examples.quickstart.standins.sets import OCR_KINDS, STANDINS
from mindvl_jax.cli import main as cli
from mindvl_jax.core.errors import UserError
from mindvl_jax.evaluation.benchmarks import load_items, open_task, question_alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("standins")
    build(out)
    return out


def _pixels(image) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image if isinstance(image, bytes) else image.read())).convert("RGB"))


@pytest.mark.parametrize("task", [standin.task for standin in STANDINS])
def test_both_published_forms_ask_the_same_and_show_the_same(folder, task):
    ours, theirs = load_items(task, folder), load_items(task, folder / "tsv")
    assert len(ours) == len(theirs) == next(standin.count for standin in STANDINS if standin.task == task)
    for one, other in zip(ours, theirs):
        assert (one.messages, one.answers, one.category, len(one.images)) == (
            other.messages,
            other.answers,
            other.category,
            len(other.images),
        )
    for one, other in list(zip(ours, theirs))[::13]:
        assert all(np.array_equal(_pixels(a), _pixels(b)) for a, b in zip(one.images, other.images, strict=True))


def test_the_same_call_gives_the_same_files(folder, tmp_path):
    build(tmp_path, ["docvqa_val", "mme"])
    for name in ("docvqa_val.parquet", "mme.parquet", "tsv/DocVQA_VAL.tsv", "tsv/MME.tsv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_only_the_held_out_side_of_the_material_is_asked_for(monkeypatch, tmp_path):
    from examples.quickstart import assets

    asked = set()
    for name in ("digit_cells", "faces", "columns", "shape_pictures"):
        original = getattr(assets, name)
        monkeypatch.setattr(
            assets,
            name,
            lambda split, *rest, original=original, name=name, **further: (
                asked.add((name, split)) or original(split, *rest, **further)
            ),
        )
    drawn = []
    original_drawing = assets.drawing
    monkeypatch.setattr(
        assets, "drawing", lambda artist, *rest: drawn.append(artist) or original_drawing(artist, *rest)
    )
    build(tmp_path)
    assert {split for _, split in asked} == {pictures.SPLIT} == {"test"}
    assert len({name for name, _ in asked}) >= 3 and set(drawn) == set(assets.TEST_ARTISTS)


def test_every_category_and_rotation_of_the_benchmarks_occurs(folder):
    assert {item.category for item in load_items("ocrbench", folder)} == set(OCR_KINDS)
    assert {item.category for item in load_items("chartqa_test", folder)} == {"human", "augmented"}
    by_question: dict[str, list] = {}
    for item in load_items("mmbench_dev_en", folder):
        by_question.setdefault(item.extra["original"], []).append(item)
    assert all(sorted(item.answers[0] for item in group) == list("ABCD") for group in by_question.values())
    assert all(len({item.extra["options"][item.answers[0]] for item in group}) == 1 for group in by_question.values())
    kinds = [item.extra["options"] is None for item in load_items("mmmu_dev_val", folder)]
    assert 0 < sum(kinds) < len(kinds)


def test_scores_on_stand_ins_are_called_so(folder):
    assert open_task("mme", folder)[0].title == "MME (stand-in)"
    assert "not the benchmarks" in json.loads((folder / "standins.json").read_text())["what"]


def test_the_question_alone_keeps_options_and_leaves_the_instruction_out(folder):
    def content(task, index=0):
        return question_alone(load_items(task, folder)[index]).messages[-1]["content"]

    assert content("docvqa_val") == "<image>What is the page?"
    assert content("mmbench_dev_en").startswith("<image>What is this?\nA. ") and content("mmbench_dev_en").endswith(
        "\nAnswer A, B, C or D."
    )
    assert "several options" not in content("mmbench_dev_en") and "directly" not in content("ai2d_test")


def test_an_unknown_stand_in_is_refused(tmp_path):
    with pytest.raises(UserError, match="no stand-in for textvqa_val"):
        build(tmp_path, ["textvqa_val"])


def test_evaluate_scores_them_and_says_that_they_are_stand_ins(folder, model_folder, tmp_path, capsys):
    tasks = ["docvqa_val", "ocrbench", "mmmu_dev_val"]  # a list of answers, categories, two images
    assert (
        cli.main(
            [
                "evaluate",
                "--weights",
                str(model_folder),
                "--data",
                str(folder),
                "--tasks",
                ",".join(tasks),
                "--limit",
                "3",
                "--max-new-tokens",
                "2",
                "--batch",
                "3",
                "--max-pixels",
                "3136",
                "--no-language-only",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert all(f"{task} (stand-in): " in printed for task in tasks)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == set(tasks) and all(result["n"] == 3 and result["errors"] == 0 for result in scores.values())
    assert "OCRBench (stand-in)" in (tmp_path / "index.html").read_text()
