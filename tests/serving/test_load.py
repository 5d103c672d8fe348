"""`mindvl bench serve` against the tiny server."""

import json

import pytest
from PIL import Image

from mindvl_jax.cli import main as cli
from mindvl_jax.inference.server.load import Load, Seen, figures


@pytest.mark.parametrize("loop", [["--clients", "3"], ["--rate", "50", "--images", "1", "--image-size", "56"]])
def test_the_command_counts_every_request_and_token_and_draws(running, tmp_path, loop):
    command = ["bench", "serve", "--url", running.url, "--requests", "7", "--tokens", "5", "--words", "6", *loop]
    assert cli.main([*command, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["requests"] == 7 and not found["errors"]
    assert found["tokens_per_second"] * found["seconds"] == pytest.approx(35)
    for name in ("first_token", "between_tokens", "request"):
        assert 0 <= found[name]["p50"] <= found[name]["p90"] <= found[name]["p99"]
    with Image.open(tmp_path / "load.png") as picture:
        assert picture.width > 600


def test_requests_that_fail_are_counted_by_reason_and_an_absent_server_is_named(running, capsys):
    command = ["bench", "serve", "--url", running.url, "--requests", "2", "--clients", "1", "--words", "200"]
    assert cli.main(command) != 0  # longer than the context
    assert "status 400" in capsys.readouterr().err
    assert cli.main(["bench", "serve", "--url", "http://127.0.0.1:9", "--requests", "1"]) != 0
    assert "is a server running there" in capsys.readouterr().err


def test_figures_are_those_of_the_answered_requests():
    seen = [Seen(first=0.1 * number, whole=0.1 * number + 0.9, tokens=10) for number in range(1, 11)]
    found = figures([*seen, Seen(error="status 429")], seconds=2.0)
    assert found["first_token"]["p50"] == pytest.approx(0.55) and found["between_tokens"]["p99"] == pytest.approx(0.1)
    assert (found["tokens_per_second"], found["requests_per_second"]) == (50, 5)
    assert (found["requests"], found["errors"]) == (11, {"status 429": 1})


def test_prompts_share_their_start_alone_and_an_equal_seed_repeats_them():
    load = Load(requests=2, words=9, shared_words=4, images=1, image_size=28)
    first, second = (load.body("m", number)["messages"][0]["content"] for number in (0, 1))
    assert first == load.body("m", 0)["messages"][0]["content"] and first[0] != second[0]
    words = [part[1]["text"].split() for part in (first, second)]
    assert words[0][:4] == words[1][:4] and words[0][4:] != words[1][4:] and len(words[0]) == 9
