"""Images show what their answers say, by witnesses that look at pixels or at the published answers."""

import collections
import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from examples.quickstart import assets, blind, charts, digits, emoji, shapes, text, words
from examples.quickstart.pictures import CELL, NAMED_COLOURS, ink_and_paper


def test_digit_labels_fit_the_handwriting():
    """Nearest mean of the training columns: far from perfect, but wrong labels would leave it at chance (0.1)."""
    pixels, labels = assets.digit_cells("train")
    means = np.stack([pixels[labels == digit].mean(0) for digit in range(10)])
    held, truth = assets.digit_cells("test")
    guess = np.square(held[:, None].astype(np.float32) - means).sum((2, 3)).argmin(1)
    accuracy = float((guess == truth).mean())
    assert accuracy > 0.7, accuracy


def test_digits_stand_in_their_own_squares_in_the_order_of_the_answer():
    """Matched against the cells they were drawn from: test images are neither turned nor shifted."""
    cells, labels = assets.digit_cells("test")
    small = np.stack(
        [np.asarray(Image.fromarray(cell).resize((25, 25), Image.Resampling.BILINEAR), np.float32) for cell in cells]
    )
    small -= small.mean((1, 2), keepdims=True)
    small /= np.linalg.norm(small, axis=(1, 2), keepdims=True)
    rng = random.Random(5)
    for _ in range(20):
        picture, answer = digits.draw(rng, "test", rng.randint(1, 5))
        grey = np.asarray(Image.fromarray(picture).convert("L"), np.float32)
        assert grey.shape == (CELL, CELL * len(answer))
        for place, digit in enumerate(answer):
            square = grey[1:26, CELL * place + 1 : CELL * place + 26]
            square = square - square.mean()
            # Ink may be lighter or darker than the paper: the sign of the match does not matter.
            match = np.abs((small * square).sum((1, 2))) / np.linalg.norm(square)
            # 0.8: the 25-pixel digit stands half a pixel off the grid that it is compared on; other digits reach 0.7.
            assert labels[match.argmax()] == int(digit) and match.max() > 0.8, (answer, place, float(match.max()))


def test_letters_stand_in_their_own_squares():
    rng = random.Random(0)
    for word in ("cat", "wimpy", "i"):
        picture = words.draw(rng, "test", word, "cells")
        assert picture.shape[:2] == (CELL, CELL * len(word))
        grey = np.asarray(Image.fromarray(picture).convert("L"), np.float32)
        paper = np.median(grey)
        for place in range(len(word)):
            assert np.abs(grey[:, CELL * place : CELL * (place + 1)] - paper).max() > 60, (word, place)


def test_typeset_words_keep_inside_their_picture():
    rng = random.Random(1)
    for word in ("wimpy", "mamma", "ill"):
        for _ in range(10):
            picture = words.draw(rng, "train", word, "typeset")
            grey = np.asarray(Image.fromarray(picture).convert("L"), np.float32)
            assert picture.shape[1] % CELL == 0
            assert np.ptp(grey[:, -1]) < 40, f"{word} is cut off on the right"


def test_ink_and_paper_are_far_apart():
    rng = random.Random(2)
    for number in range(500):
        ink, paper = (np.mean(colour) for colour in ink_and_paper(rng, coloured=number % 2 == 0))
        assert abs(ink - paper) >= 110


def test_bars_are_as_long_as_their_values_and_answers_can_be_read_off():
    rng = random.Random(3)
    for _ in range(40):
        chart = charts.choose(rng, "train")
        pixels = np.asarray(charts.draw(rng, "train", chart)).astype(int)
        assert pixels.shape == (CELL * len(chart.values), charts.WIDTH, 3)
        area = pixels[:, CELL * charts.LABEL_CELLS : CELL * (charts.LABEL_CELLS + charts.BAR_CELLS)]
        lengths = [
            int((np.abs(area[CELL * row + CELL // 2] - NAMED_COLOURS[colour]).sum(-1) == 0).sum())
            for row, colour in enumerate(chart.colours)
        ]
        for value, length in zip(chart.values, lengths):
            # 46 pixels stand for the largest value beyond the first 6, half a pixel of rounding and one of the end
            # point.
            assert abs((length - 7) / 46 - value / max(chart.values)) <= 1.5 / 46, (chart, lengths)
        for _ in range(6):
            question, answer = charts.question_about(rng, chart)
            if question == charts.QUESTIONS["count"][1]:
                assert answer == str(len(lengths))
            elif question == charts.QUESTIONS["largest"][1]:
                assert answer == str(max(chart.values))
            elif "bar?" in question and "value" in question:
                named = [
                    row
                    for row, (colour, place) in enumerate(zip(chart.colours, charts.PLACES))
                    if f" {colour} " in question or f" {place} " in question
                ]
                assert answer == str(chart.values[named[0]]) and len(named) == 1


def test_chart_questions_come_in_the_stated_shares():
    rng = random.Random(4)
    chart = charts.Chart(("a", "b", "c"), (3, 2, 1), ("red", "blue", "green"))
    counts = collections.Counter(charts.question_about(rng, chart)[0] for _ in range(4000))
    share = counts[charts.QUESTIONS["count"][1]] / 4000
    # Four standard deviations of a share of 0.08 among 4,000.
    assert abs(share - 0.08) < 0.018, share
    assert sum(share for share, _ in charts.QUESTIONS.values()) == pytest.approx(1)


def test_our_answers_agree_with_every_published_one():
    asked, known = 0, 0
    for split in ("train", "validation", "test"):
        for picture, shape, colour in shapes.described(split):
            known += 1
            for question, published in picture.questions:
                asked += 1
                assert shapes.answer(question, shape, colour) == published, (picture.file, question)
    assert asked > 44_000 and known > 4_400


def test_training_questions_about_shapes_are_the_published_ones_of_the_training_part():
    published = {
        (picture.file.read_bytes(), *turn) for picture in assets.shape_pictures("train") for turn in picture.questions
    }
    asked = [
        (sample.image, *turn)
        for sample in shapes.conversations(random.Random(0), "train", 0, 500)
        for turn in sample.turns
    ]
    assert set(asked) <= published and len(asked) > 900


def test_open_training_questions_cannot_be_answered_blind():
    pairs = [turn for sample in shapes.open_questions(random.Random(0), "train", 0, 2000) for turn in sample.turns]
    # Commonest shape and colour, each asked half of the time: a third, an eighth, and what chance adds among 107
    # wordings.
    assert blind.score(pairs, pairs) < 0.32


def test_what_a_training_question_names_does_not_tell_whether_it_is_there():
    rng = random.Random(0)
    shares = collections.Counter()
    for _ in range(4000):
        shape, colour = rng.choice(shapes.SHAPES), rng.choice(shapes.COLOURS)
        value = shapes.asked_value(shapes.yes_no_question(rng, shape, colour))
        shares[value in shapes.SHAPES, value in (shape, colour)] += 1
    # Each of the four a quarter; four standard deviations among 4,000.
    assert all(abs(count / 4000 - 0.25) < 0.028 for count in shares.values()) and len(shares) == 4, shares


def test_text_samples_answer_from_their_own_words():
    for sample in text.texts(random.Random(0), "train", 300):
        question, answer = sample.turns[0]
        if sample.task in ("text/digits", "text/word"):
            assert question.split(".")[0].replace(" ", "") == answer.replace(" ", "")
        if sample.task == "text/chart" and answer.isdigit() and "How many" not in question:
            assert f": {answer}" in question


def test_training_drawings_vary_and_scored_ones_do_not():
    rng = random.Random(0)
    first, second = (np.asarray(emoji.vary(rng, "noto", 3)) for _ in range(2))
    assert first.shape == (emoji.SIDE, emoji.SIDE, 3) and np.abs(first.astype(int) - second).mean() > 3
    assert np.array_equal(np.asarray(emoji.plain("noto", 3)), np.asarray(emoji.plain("noto", 3)))


def test_drawings_fill_their_picture():
    for artist in (*assets.TRAIN_ARTISTS, *assets.MORE_ARTISTS, *assets.TEST_ARTISTS):
        for concept in {0, 137, 400} & assets.drawn_by(artist):
            pixels = np.asarray(emoji.plain(artist, concept)).astype(int)
            inked = (np.abs(pixels - 255).sum(-1) > 30).mean()
            assert inked > 0.08, f"{artist} {assets.concepts()[concept]}: {inked:.2f} of the picture is drawn on"


def test_majority_answers_are_those_counted_by_hand():
    training = [("q", "a"), ("q", "b"), ("q", "b"), ("r", "c"), ("r", "a"), ("s", "b")]
    answers, otherwise = blind.majority(training)
    assert (dict(answers), otherwise) == ({"q": "b", "r": "a", "s": "b"}, "b")  # r: of equals the first in the alphabet
    assert blind.score(training, [("q", "b"), ("q", "a"), ("r", "a"), ("new", "b")]) == 0.75


def test_the_blind_score_of_the_published_test_is_the_known_one():
    test = [pair for picture in assets.shape_pictures("test") for pair in picture.questions]
    training = [
        pair
        for split in ("train", "validation")
        for picture in assets.shape_pictures(split)
        for pair in picture.questions
    ]
    assert blind.score(training, test) == pytest.approx(0.670, abs=0.001)


def test_blind_scores_of_a_build_are_low_where_only_the_picture_tells(quickstart, capsys):
    assert blind.main(["--data", str(quickstart), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["words"] == scores["typeset"] == 0
    assert scores["digits"] < 0.1 and scores["emoji"] < 0.1 and scores["charts"] < 0.25
    assert 0.5 < scores["easyvqa"] < 0.8
    assert blind.main(["--data", str(quickstart / "nothing")]) == 2
    assert "build it with" in capsys.readouterr().err


def test_contact_sheets_can_be_opened(quickstart):
    sheets = sorted((quickstart / "contact").glob("*.png"))
    assert len(sheets) == 23  # every file but the text
    for sheet in sheets:
        assert min(Image.open(io.BytesIO(sheet.read_bytes())).size) > 60
