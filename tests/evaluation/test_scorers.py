"""Rules checked by cases worked out by hand from the benchmarks' papers and published task code."""

import pytest

from mindvl_jax.evaluation import choices, scorers


@pytest.mark.parametrize(
    "first, second, distance",
    [("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0), ("日本", "日木", 1)],
)
def test_anls_counts_edits_of_known_pairs(first, second, distance):
    similarity = 1 - distance / max(len(first), len(second))
    assert scorers.anls(first, [second], threshold=0) == pytest.approx(similarity)
    assert scorers.anls(second, [first], threshold=0) == pytest.approx(similarity)


@pytest.mark.parametrize(
    "prediction, answers, score",
    [
        ("ITC Limited", ["itc limited"], 1.0),
        ("  ITC   Limited ", ["ITC Limited"], 1.0),
        ("ITC", ["ITC Limited"], 0.0),  # 8 of 11 letters missing: below the threshold
        ("ITC Limitd", ["ITC Limited"], 1 - 1 / 11),
        ("alpah", ["alpha", "beta"], 1 - 2 / 5),
        ("abcd", ["abxy"], 0.5),  # exactly at the threshold counts
        ("", [""], 1.0),
    ],
)
def test_anls(prediction, answers, score):
    assert scorers.anls(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    "prediction, answer, right, swapped",
    [
        ("105", "100", 1, 1),
        ("95", "100", 1, 0),  # off by exactly 5 % of the answer, which is 5.26 % of the prediction
        ("94", "100", 0, 0),
        ("105.2", "100", 0, 1),
        ("5%", "0.05", 1, 1),
        ("12", "12.0", 1, 1),
        ("0", "0", 1, 1),
        ("0.0", "0", 0, 0),
        ("Japan", "japan", 1, 1),
        ("Japan.", "Japan", 0, 0),
        ("1,000", "1000", 0, 0),
        ("-5", "5", 0, 0),
    ],
)
def test_relaxed_accuracy_and_its_swapped_form(prediction, answer, right, swapped):
    assert (scorers.relaxed_accuracy(prediction, answer), scorers.relaxed_accuracy_swapped(prediction, answer)) == (
        right,
        swapped,
    )


@pytest.mark.parametrize(
    "prediction, answers, formula, score",
    [
        ("It says Hello!", ["hello"], False, 1),
        ("HELL O", ["hello"], False, 0),
        ("Ｈｅｌｌｏ", ["hello"], False, 1),
        (r"x ^ 2 + 1", ["x^2+1"], True, 1),
        (r"X^2+1", ["x^2+1"], True, 0),
        ("nothing", ["one", "two"], False, 0),
    ],
)
def test_ocrbench(prediction, answers, formula, score):
    assert scorers.ocrbench_match(prediction, answers, formula=formula) == score


@pytest.mark.parametrize(
    "text, read",
    [
        ("Yes.", "yes"),
        ("no", "no"),
        ("y", "yes"),
        ("N", "no"),
        ("Yes, there is", "yes"),
        ("A dog", "other"),
        ("", "other"),
        ("Not sure", "no"),
        ("I say yes", "other"),
    ],
)
def test_yes_or_no(text, read):
    assert scorers.yes_or_no(text) == read


def test_vqa_accuracy_leaves_each_annotator_out():
    # Three of ten say so: leaving one of them out, 2/3; leaving another out, 1. Mean: (3 * 2/3 + 7 * 1) / 10.
    assert scorers.vqa_accuracy("stop", ["stop"] * 3 + ["halt"] * 7) == pytest.approx(0.9)
    assert scorers.vqa_accuracy("stop", ["stop"] * 4 + ["halt"] * 6) == 1
    assert scorers.vqa_accuracy("go", ["stop"] * 10) == 0


@pytest.mark.parametrize(
    "given, normal",
    [
        ("The Two dogs.", "2 dogs"),
        ("dont", "don't"),
        ("10,000", "10000"),
        ("U.S.", "us"),
        ("3.5", "3.5"),
        ("b-c", "b c"),
        ("none", "0"),
        ("what's up?", "what 's up"),
    ],
)
def test_vqa_normal_form(given, normal):
    assert scorers.vqa_normal_form(given) == normal


@pytest.mark.parametrize(
    "prediction, answer, score",
    [
        ("The answer is 12.", "12", 1),
        ("x = 3.14159", "3.14", 1),
        ("so the total is 1,200", "1200", 1),
        ("about 12.5", "12.4", 0),
        ("Therefore it is photosynthesis", "Photosynthesis", 1),
        ("cat", "dog", 0),
        ("", "12", 0),
    ],
)
def test_mmmu_open_questions(prediction, answer, score):
    assert scorers.mmmu_open(prediction, [answer]) == score


OPTIONS = {"A": "a red ball", "B": "a cube", "C": "nothing", "D": "two cones"}


@pytest.mark.parametrize(
    "answer, option",
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("Answer: D", "D"),
        ("It shows a cube on a table", "B"),
        ("A cube", "A"),
        ("A dog and a cat", "A"),
        ("none of them", ""),
        ("", ""),
        ("B or C", "B"),
        ("I think A is not right, it is B.", "B"),
    ],
)
def test_mmbench_option(answer, option):
    assert choices.mmbench_option(answer, OPTIONS) == option


@pytest.mark.parametrize(
    "answer, option",
    [
        ("(B)", "B"),
        ("B", "B"),
        ("The answer is B", "B"),
        ("A or B", "B"),
        ("it has the two cones that were asked for", "D"),
        ("cones", ""),
        ("?", ""),
    ],
)
def test_mmmu_option_never_guesses(answer, option):
    assert choices.mmmu_option(answer, list(OPTIONS.values())) == option


@pytest.mark.parametrize(
    "answer, letter, same",
    [
        ("B.", "B", True),
        ("b", "B", True),
        ("B. stem", "B", True),
        ("(B)", "B", True),
        ("stem", "B", False),
        ("The answer is B", "B", False),
    ],
)
def test_ai2d_reads_a_letter_or_nothing(answer, letter, same):
    assert choices.same_option(answer, letter) is same


def test_exact_match_forgives_white_space_only():
    assert scorers.exact_match(" c a  t\n", ["c a t"]) == 1
    assert scorers.exact_match("Cat", ["cat"]) == 0
    assert scorers.exact_match("cat", ["dog", "cat"]) == 1
