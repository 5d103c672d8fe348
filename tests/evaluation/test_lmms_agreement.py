"""Our scorers against lmms-eval's own task code, where it is installed; and, always, golden cases of its formulas
worked out by hand.
"""

import importlib.util
from pathlib import Path

import pytest

from mindvl_jax.evaluation.benchmarks import BENCHMARKS
from mindvl_jax.evaluation.evaluate import summarise
from mindvl_jax.evaluation.items import Item


@pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval 0.7.3 is not installed here; docs/evaluation.md says how to install it beside this project",
)
def test_lmms_evals_own_task_code_scores_every_sample_of_the_stand_ins_as_we_do(tmp_path):
    from examples.quickstart.standins.build import build

    spec = importlib.util.spec_from_file_location("lmms_agreement", Path(__file__).with_name("lmms_agreement.py"))
    agreement = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(agreement)
    build(tmp_path / "standins")
    report = agreement.compare(tmp_path / "standins", tmp_path / "lmms", rounds=2)
    different = {name: entry["different"] for name, entry in report.items() if entry["different"]}
    assert not different, f"{sum(map(len, different.values()))} disagreements: {different}"
    assert all(0.1 < entry["right"] / entry["compared"] < 0.9 for entry in report.values()), (
        "the answers are all right or all wrong: this proves little"
    )


def _item(answers, **extra) -> Item:
    return Item(
        id="0",
        messages=({"role": "user", "content": "q"},),
        answers=tuple(answers),
        category=extra.pop("category", ""),
        extra=extra,
    )


OPTIONS = ["a cat", "two dogs", "the sun", "rain"]

# (task, item, answer, score): each score worked out from the published formula that is named.
GOLDEN = [
    # docvqa, infovqa: 1 - distance / longer length over lower-cased, squeezed texts; 0 below 0.5; best of the answers.
    ("docvqa_val", _item(["Grove"]), "grove", 1.0),
    ("docvqa_val", _item(["Grove"]), "grov", 1 - 1 / 5),
    ("docvqa_val", _item(["Grove"]), "The answer is Grove", 0.0),  # 14 of 19 characters too many
    (
        "docvqa_val",
        _item(["227.30"]),
        " 227.30.\n",
        1 - 1 / 7,
    ),  # white space around an answer does not count, the period does
    ("docvqa_val", _item(["12", "page: 12"]), "page: 13", 1 - 1 / 8),
    ("docvqa_val", _item(["1997"]), "2001", 0.0),  # all four differ
    ("infovqa_val", _item(["354"]), "345", 0.0),  # two substitutions of three: 1/3 is below one half
    ("infovqa_val", _item(["mailbox", "the mailbox"]), "mail box", 1 - 1 / 8),
    # chartqa: 5 % of the answer for numbers, a per cent sign divides by 100, other text exactly but for case.
    ("chartqa_test", _item(["108"]), "113.3", 1.0),
    ("chartqa_test", _item(["108"]), "113.5", 0.0),
    ("chartqa_test", _item(["0.82"]), "82%", 1.0),
    ("chartqa_test", _item(["Yes"]), "yes\n", 1.0),
    ("chartqa_test", _item(["Yes"]), "Yes.", 0.0),
    ("chartqa_test", _item(["80"]), "about 80", 0.0),
    # ocrbench: the answer occurs in the prediction, case aside; formulas without blanks and with case.
    ("ocrbench", _item(["gild"], formula=False), "It says GILD here", 1.0),
    ("ocrbench", _item(["gild"], formula=False), "gi ld", 0.0),
    ("ocrbench", _item(["4 + 2"], formula=True), "4+2", 1.0),
    ("ocrbench", _item(["4 + 2"], formula=False), "4+2", 0.0),
    # ai2d: a leading `X.` is the answer, otherwise the whole answer, case and punctuation aside.
    ("ai2d_test", _item(["B"]), "B. two dogs", 1.0),
    ("ai2d_test", _item(["B"]), "(b)", 1.0),
    ("ai2d_test", _item(["B"]), "B two dogs", 0.0),
    ("ai2d_test", _item(["B"]), "two dogs", 0.0),
    # mmbench: one option letter among the words, then one option's text in the answer, then the most telling letter.
    ("mmbench_dev_en", _item(["B"], options=dict(zip("ABCD", OPTIONS)), original="0"), "The answer is B", 1.0),
    ("mmbench_dev_en", _item(["B"], options=dict(zip("ABCD", OPTIONS)), original="0"), "I see Two Dogs", 1.0),
    ("mmbench_dev_en", _item(["B"], options=dict(zip("ABCD", OPTIONS)), original="0"), "the sun and rain", 0.0),
    # mme: the first four characters say yes or no.
    ("mme", _item(["Yes"], pair="x/1"), "Yes, it is", 1.0),
    ("mme", _item(["No"], pair="x/1"), "Nope", 1.0),
    ("mme", _item(["Yes"], pair="x/1"), "I think yes", 0.0),
    # mmmu: `(B)`, then `B `, then `B.`; an option's text only in answers of more than five words; open: numbers to two
    # decimals.
    ("mmmu_dev_val", _item(["B"], options=OPTIONS), "(B) because of C", 1.0),
    ("mmmu_dev_val", _item(["B"], options=OPTIONS), "what I can see is two dogs", 1.0),
    ("mmmu_dev_val", _item(["B"], options=OPTIONS), "two dogs", 0.0),  # the published rule draws an option here
    ("mmmu_dev_val", _item(["83"], options=None), "the total is 83.001", 1.0),
    ("mmmu_dev_val", _item(["83"], options=None), "84", 0.0),
]


@pytest.mark.parametrize(
    "task, item, answer, score", GOLDEN, ids=[f"{task}: {answer.strip()}" for task, _, answer, _ in GOLDEN]
)
def test_golden_cases_of_the_published_formulas(task, item, answer, score):
    benchmark = BENCHMARKS[task]
    assert benchmark.score(item, answer)[benchmark.metric] == pytest.approx(score, abs=1e-12)


def test_mme_points_worked_out_by_hand():
    """Two pairs in one category: 3 of 4 questions right and 1 of 2 pairs whole: 75 + 50."""
    items = [
        _item([answer], category="existence", pair=f"existence/{pair}") for pair in (0, 1) for answer in ("Yes", "No")
    ]
    result = summarise(
        BENCHMARKS["mme"], items, [{"prediction": answer} for answer in ("yes", "no", "yes", "yes")], None
    )
    assert result["mme_perception"] == 125.0 and result["mme_cognition"] == 0
