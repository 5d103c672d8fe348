"""Regressions: messages of commands that were once wrong."""

import argparse
import fcntl
import functools
import importlib
import inspect
import json
import time

import pytest

from mindvl_jax.cli import common
from mindvl_jax.cli.main import COMMANDS
from mindvl_jax.cli.profile import require_training
from mindvl_jax.cli.score import with_answer
from mindvl_jax.core.compiled import share_compiled_programs
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.sample import Message, Sample


def test_every_set_counts(mindvl):
    code, _, told = mindvl("data", "check", "--config", "smoke", "--set", "rn.seed=3", "--set", "run.seed=4")
    assert code == 2 and "--set rn.seed=3" in told


def test_a_run_that_does_not_train_is_not_asked_to_profile(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="nothing trains in"):
        require_training(tmp_path)
    (tmp_path / ".lock").touch()
    with pytest.raises(UserError, match="nothing trains in"):
        require_training(tmp_path)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        require_training(tmp_path)


def test_training_through_the_bridge_without_torch_says_what_to_install(
    monkeypatch, published, squares, tmp_path, mindvl
):
    from mindvl_jax.training import backend

    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    code, _, told = mindvl(
        "train",
        "--model",
        published,
        "--data",
        squares / "squares.json",
        "--run",
        tmp_path / "run",
        "--set",
        "backend=npu_bridge",
        "bridge.device=cpu",
    )
    assert code == 2 and "pip install 'mindvl-jax[bridge]'" in told


def test_evaluation_files_that_end_with_a_question_can_be_scored():
    question = Sample("a", (Message("user", "Colour?"),), answers=("red", "crimson"))
    assert [(turn.role, turn.content) for turn in with_answer(question).messages] == [
        ("user", "Colour?"),
        ("assistant", "red"),
    ]
    answered = Sample("a", (Message("user", "Colour?"), Message("assistant", "blue")), answers=("red",))
    assert (
        with_answer(answered) is answered and with_answer(Sample("a", question.messages)).messages == question.messages
    )


def test_the_words_of_a_model_are_listed(published, mindvl):
    code, printed, told = mindvl("generate", "--weights", published, "--words")
    words = [json.loads(line) for line in printed.splitlines()]
    assert code == 0 and len(words) >= 263 and "a" in words and "Z" in words, told


def test_commands_share_compiled_programs_and_jaxs_own_setting_wins(monkeypatch, tmp_path):
    import os

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    share_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "mindvl_jax" / "xla")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    share_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"


def test_metrics_of_a_run_are_a_table(tmp_path, mindvl):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null, "sample_ids": ["a"]}\n'
    )
    assert mindvl("metrics", tmp_path)[1].splitlines() == ["step,loss,sample_ids", "1,2.0,", '2,,"[""a""]"']
    assert json.loads(mindvl("metrics", tmp_path, "--json", "--columns", "loss", "--last", "1")[1]) == [{"loss": None}]
    assert "the run has step, loss" in mindvl("metrics", tmp_path, "--columns", "los")[2]


def test_results_are_json_on_standard_output_alone(tmp_path, mindvl):
    code, printed, _ = mindvl("config", "smoke", "--json", "--set", "run.seed=9")
    assert code == 0 and json.loads(printed)["run"]["seed"] == 9


def test_every_command_that_has_results_offers_json_and_each_shows_an_example():
    for name, (module, _) in COMMANDS.items():
        command = importlib.import_module(module)
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        text = inspect.getsource(command)
        if name in (
            "data",
            "generate",
            "evaluate",
            "compare",
            "config",
            "doctor",
            "metrics",
            "parity",
            "plan",
            "replay",
        ):
            assert '"--json"' in text, name
        assert name == "serve" or f"mindvl {name}" in command.EPILOG, name


def test_loading_says_so_when_it_takes_long(monkeypatch, capsys):
    monkeypatch.setattr(common.importlib, "import_module", lambda name: time.sleep(0.1))
    monkeypatch.setattr(common, "working", functools.partial(common.working, soon=0.01))
    common.load_slow("jax")
    assert "loading JAX (0:00 so far)" in capsys.readouterr().err
