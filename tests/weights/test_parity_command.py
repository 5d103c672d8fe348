"""`mindvl parity` passes on a sound folder and finds a wrong one, naming the part."""

import json

import numpy as np
import pytest

from mindvl_jax.cli.main import main
from mindvl_jax.parity import check as checking


def test_a_sound_folder_passes_with_table_and_picture(published, tmp_path, capsys):
    assert (
        main(
            [
                "parity",
                "--weights",
                str(published("qwen2.5-vl")),
                "--out",
                str(tmp_path),
                "--samples",
                "3",
                "--text-tokens",
                "6",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "same mathematics" in out and "vision block" in out and "projector" in out
    found = json.loads((tmp_path / "parity.json").read_text())
    assert found["passed"] and found["logits"]["top1"] == 1.0 and found["logits"]["kl"] < 1e-6
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_constant_is_found_and_located(published, monkeypatch, tmp_path):
    """With another rope theta than the reference's, the attention parts must differ and nothing else."""
    folder = published("qwen3")
    real = checking.read_config

    def other_theta(path):
        config = real(path)
        return config.model_copy(update=dict(text=config.text.model_copy(update=dict(rope_theta=30.0))))

    monkeypatch.setattr(checking, "read_config", other_theta)
    outcome = checking.check(folder, samples=2, text_tokens=12)
    assert not outcome.passed
    wrong = {part.name for part in outcome.parts if part.difference > 1e-3 * part.scale}
    assert wrong == {"layer 0 attention", "layer 1 attention"}


def test_mean_kl_is_the_formula():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 7)) * 3
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    np.testing.assert_allclose(checking.mean_kl(b, a), (p * np.log(p / q)).sum(-1).mean(), rtol=1e-9)


@pytest.mark.parametrize("argument", ["--samples", "--text-tokens"])
def test_sizes_below_one_are_refused(tmp_path, argument, capsys):
    assert main(["parity", "--weights", str(tmp_path), argument, "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
