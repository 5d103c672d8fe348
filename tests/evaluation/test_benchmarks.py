import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mindvl_jax.core.errors import UserError
from mindvl_jax.evaluation import benchmarks
from mindvl_jax.evaluation.benchmarks import BENCHMARKS, load_items
from mindvl_jax.evaluation.evaluate import summarise
from mindvl_jax.evaluation.metrics import parse_task


def _summary(name, items, answer):
    rows = [{"prediction": answer(item)} for item in items]
    return summarise(BENCHMARKS[name], items, rows, None)


@pytest.mark.parametrize(
    "name, count",
    [
        ("docvqa_val", 6),
        ("chartqa_test", 6),
        ("ocrbench", 3),
        ("mme", 8),
        ("mmbench_dev_en", 12),
        ("ai2d_test", 4),
        ("mmmu_dev_val", 4),
        ("textvqa_val", 3),
        ("realworldqa", 2),
    ],
)
def test_right_answers_score_one_and_wrong_ones_nothing(benchmark_folder, name, count):
    items = load_items(name, benchmark_folder)
    assert len(items) == count and all(item.images for item in items)
    assert all(item.messages[-1]["content"].count("<image>") == len(item.images) for item in items)
    assert _summary(name, items, lambda item: item.answers[0])["score"] == 1
    assert _summary(name, items, lambda item: "zzz")["score"] == 0


def test_published_prompts(benchmark_folder):
    def prompt(name, index=0):
        return load_items(name, benchmark_folder)[index].messages[-1]["content"]

    assert prompt("docvqa_val") == "<image>which number 0?\nAnswer the question using a single word or phrase."
    assert prompt("chartqa_test") == "<image>value 0?\nAnswer the question with a single word."
    assert prompt("mme") == "<image>Is it Yes?\nAnswer the question using a single word or phrase."
    assert prompt("ai2d_test") == (
        "<image>which part?\nA. root\nB. stem\nC. leaf\nD. seed\nAnswer with the option's letter from the "
        "given choices directly."
    )
    assert prompt("mmbench_dev_en") == (
        "<image>look closely which colour? There are several options:\nA. red\nB. green\nC. blue\nD. "
        "black\n\nAnswer with the option's letter from the given choices directly."
    )
    assert (
        prompt("mmmu_dev_val", 3)
        == "<image><image>Compare <image 1> and <image 2>.\n\nAnswer the question using a single word or phrase."
    )


def test_a_row_may_name_another_rows_picture(benchmark_folder):
    items = load_items("docvqa_val", benchmark_folder)
    assert items[2].images[0].read() == items[1].images[0].read() != items[3].images[0].read()


def test_chartqa_tells_human_from_augmented_and_reports_both_argument_orders(benchmark_folder):
    items = load_items("chartqa_test", benchmark_folder)
    result = _summary(
        "chartqa_test",
        items,
        lambda item: str(int(item.answers[0]) * 1.051) if item.category == "human" else item.answers[0],
    )
    assert result["by_category"] == {"augmented": {"score": 1.0, "n": 3}, "human": {"score": 0.0, "n": 3}}
    assert (result["relaxed_accuracy"], result["relaxed_accuracy_swapped"]) == (0.5, 1.0)


def test_mme_points_are_single_accuracy_plus_pair_accuracy(benchmark_folder):
    items = load_items("mme", benchmark_folder)
    result = _summary("mme", items, lambda item: "yes")  # half of each pair, no pair whole
    assert result["mme_points_by_category"] == {"existence": 50.0, "numerical_calculation": 50.0}
    assert (
        result["mme_perception"],
        result["mme_cognition"],
        result["mme_points"],
        result["mme_incomplete_pairs"],
    ) == (50.0, 50.0, 100.0, 0)
    assert _summary("mme", items, lambda item: item.answers[0])["mme_points"] == 400


def test_mmbench_counts_a_question_only_when_every_rotation_is_right(benchmark_folder):
    items = load_items("mmbench_dev_en", benchmark_folder)
    result = _summary("mmbench_dev_en", items, lambda item: "A")  # right in one rotation of each question
    assert result["score"] == 0.25 and result["circular_accuracy"] == 0 and result["questions"] == 3
    result = _summary("mmbench_dev_en", items, lambda item: item.answers[0] if item.extra["original"] == "1" else "A")
    assert result["circular_accuracy"] == pytest.approx(1 / 3, abs=1e-4)


def test_mmmu_takes_the_pictures_that_the_question_names(benchmark_folder):
    assert [len(item.images) for item in load_items("mmmu_dev_val", benchmark_folder)] == [2, 2, 2, 2]


def test_an_unknown_task_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean 'docvqa_val'"):
        load_items("docvqa", tmp_path)


def test_a_missing_file_says_what_was_looked_for(tmp_path):
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(UserError, match=r"no file of ChartQA in .*other.txt.*chartqa_test.parquet"):
        load_items("chartqa_test", tmp_path)


def test_missing_columns_are_named_together(tmp_path):
    pq.write_table(pa.table({"picture": ["x"], "text": ["y"]}), tmp_path / "mme.parquet")
    with pytest.raises(UserError, match="lacks the columns question, answer, category"):
        load_items("mme", tmp_path)
    (tmp_path / "AI2D_TEST.tsv").write_text("index\tquestion\tanswer\n1\tq\tA\n")
    with pytest.raises(UserError, match="lacks the columns options or A, image"):
        load_items("ai2d_test", tmp_path)


def test_an_empty_file_and_repeated_ids_are_refused(tmp_path):
    (tmp_path / "DocVQA_VAL.tsv").write_text("index\timage\tquestion\tanswer\n")
    with pytest.raises(UserError, match="no rows"):
        load_items("docvqa_val", tmp_path)
    pq.write_table(
        pa.table({name: pa.array([], pa.string()) for name in ("question", "answer", "category")}),
        tmp_path / "mme.parquet",
    )
    with pytest.raises(UserError, match="mme.parquet has no rows"):
        load_items("mme", tmp_path)
    (tmp_path / "InfoVQA_VAL.tsv").write_text("index\timage\tquestion\tanswer\n1\tAAAA\tq\ta\n1\tAAAA\tr\tb\n")
    with pytest.raises(UserError, match="1 ids occur more than once"):
        load_items("infovqa_val", tmp_path)


def test_every_benchmark_scores_its_own_main_metric(benchmark_folder):
    for name, benchmark in benchmarks.BENCHMARKS.items():
        if name == "infovqa_val":
            continue  # reads DocVQA's columns
        item = load_items(name, benchmark_folder)[0]
        assert benchmark.metric in benchmark.score(item, "x"), name


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", ".x", "[/x]", "=1+1", "a\0b", "x" * 300])
def test_a_task_whose_name_leaves_the_folder_of_results_is_refused(name):
    with pytest.raises(UserError, match="--tasks"):
        parse_task(f"{name}=data.jsonl")
