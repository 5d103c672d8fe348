"""Faults from outside end a run with one message that says what is safe: disks, folders, damaged files, data that
cannot be learned.
"""

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from mindvl_jax.checkpoints.checkpoint import room_in
from mindvl_jax.cli import main as cli
from mindvl_jax.config import loader as config_loader
from mindvl_jax.config.schema import ProfileConfig
from mindvl_jax.core.errors import UserError, printable
from mindvl_jax.core.progress import LogConsole
from mindvl_jax.data import workers
from mindvl_jax.models.loading import make_loader
from mindvl_jax.profiling.profiler import REQUEST, StepProfiler
from mindvl_jax.training import metrics
from mindvl_jax.training.stopping import StopRequest
from mindvl_jax.training.trainer import train


@pytest.mark.parametrize("where", ["file", "below a file", "/proc/nothing", "null", "too long"])
def test_a_run_folder_that_cannot_be_made_is_refused_before_any_work(run_config, tmp_path, where):
    (tmp_path / "file").write_text("x")
    folder = {
        "file": tmp_path / "file",
        "below a file": tmp_path / "file" / "run",
        "null": "a\0b",
        "too long": f"{tmp_path}/{'x' * 300}",
    }.get(where, where)
    config = run_config()
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder)})})
    with pytest.raises(UserError, match="run.dir=.*cannot be made or written"):
        train(config)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "no room left"),
        (errno.EDQUOT, "no room left"),
        (errno.EROFS, "cannot be read or written"),
        (errno.EACCES, "cannot be read or written"),
        (errno.EIO, "cannot be read or written"),
    ],
)
@pytest.mark.parametrize("place", ["metrics", "config", "report", "scores"])
def test_a_disk_that_fails_ends_the_run_with_what_is_safe(run_config, monkeypatch, place, code, says):
    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code), "a file")

    if place == "metrics":
        monkeypatch.setattr(metrics.MetricsLog, "write", fail)
    elif place == "config":
        monkeypatch.setattr(config_loader, "dump", fail)
    elif place == "report":
        monkeypatch.setattr("mindvl_jax.training.hooks.Hooks.report", fail)
    else:
        monkeypatch.setattr("mindvl_jax.training.hooks.Hooks.evaluates", True)
        monkeypatch.setattr("mindvl_jax.training.hooks.Hooks.evaluate", fail)
    with pytest.raises(UserError, match=f"(?s){says}.*start the same command again"):
        train(run_config({"steps": 1}, checkpoint={"asynchronous": False}))


def test_memory_that_runs_out_is_said_and_other_errors_are_not_hidden(tmp_path):
    with pytest.raises(UserError, match="out of memory"), room_in(tmp_path):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
    with pytest.raises(KeyError), room_in(tmp_path):
        raise KeyError("a mistake of ours")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00garbage\n", b"[]\n", b'{"step": "two"}\n', b"{" * 5000 + b"\n", b'{"step": 1}']
)
def test_damaged_lines_of_metrics_are_dropped(tmp_path, content):
    path = tmp_path / metrics.FILE
    path.write_bytes(b'{"step": 1, "loss": 2}\n' + content)
    metrics.cut_metrics(path, 1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "loss": 2}]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"steps": "x"}',
        b'{"steps": Infinity}',
        b'{"steps": -5}',
        b"\xff\xfe",
        b'{"steps": ' + b"9" * 5000 + b"}",
        b"{" * 5000,
        None,
    ],
)
def test_a_damaged_request_for_a_profile_is_said_once_and_ignored(tmp_path, content):
    path = tmp_path / REQUEST
    path.mkdir() if content is None else path.write_bytes(content)
    said = []
    profiler = StepProfiler(tmp_path, ProfileConfig(), said.append, lambda: pytest.fail("nothing to trace"))
    profiler.before_step(1, lambda: None)
    assert not path.exists() and len(said) <= 1
    profiler.before_step(2, lambda: None)


def test_a_phase_in_which_nothing_can_be_learned_fails_and_is_not_saved_as_done(run_mapping, tmp_path):
    (tmp_path / "broken.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + bytes.fromhex("0000000d494844520000001c0000001c0802000000fd6f3e7c") + b"cut"
    )
    with open(tmp_path / "bad.jsonl", "w", encoding="utf-8") as file:
        for index in range(8):
            file.write(
                json.dumps(
                    {
                        "id": str(index),
                        "images": ["broken.png"],
                        "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "red"}],
                    }
                )
                + "\n"
            )
    mapping = run_mapping(
        {"steps": 2, "rows": 2, "mixture": [{"source": "bad"}]},
        data={"sources": {"bad": {"path": str(tmp_path / "bad.jsonl")}}, "max_error_rate": 1.0},
    )
    for _ in range(2):
        with pytest.raises(UserError, match="none of its 2 steps had anything to learn|bad samples in a row"):
            train(config_loader.from_mapping(mapping))


def test_a_decoding_process_that_stands_still_ends_the_run(run_mapping, monkeypatch):
    monkeypatch.setattr(workers, "STANDSTILL", 20.0)
    monkeypatch.setattr(workers, "LEAVING", 1.0)
    mapping = run_mapping({"steps": 50}, data={"workers": 1, "cache_examples": False, "prefetch": 1})
    loader = make_loader(config_loader.from_mapping(mapping), 0)
    try:
        next(loader)
        monkeypatch.setattr(workers, "STANDSTILL", 1.0)
        for process in loader._decoder._pool._pool._processes.values():
            os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(UserError, match="gave no answer for 1 s"):
            for _ in range(50):
                next(loader)
    finally:
        loader.close()


def test_names_do_not_steer_the_terminal(capsys):
    console = LogConsole(stamp=False)
    console.print("phase [/x] in runs[/b] \x1b[31mred\x1b]0;title\x07 [red]kept[/red]")
    shown = capsys.readouterr().out
    assert shown.strip() == "phase [/x] in runs[/b] \\x1b[31mred\\x1b]0;title\\x07 [red]kept[/red]"
    assert printable("a\x9b2Jb\x00\n") == "a\\x9b2Jb\\x00\n"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out\x1b.jsonl"),
            2,
            "No space left on device: out\\x1b.jsonl",
        ),
        (MemoryError(), 2, "out of memory"),
        (UserError("a\x1b[2J"), 2, "a\\x1b[2J"),
    ],
)
def test_no_command_ends_in_a_traceback_for_what_comes_from_outside(monkeypatch, capsys, error, code, says):
    def fail(arguments):
        raise error

    monkeypatch.setattr("mindvl_jax.cli.config.run", fail)
    assert cli.main(["config", "x.yaml"]) == code
    assert says in capsys.readouterr().err


def test_a_run_scores_its_tasks_though_earlier_scores_are_damaged(tmp_path):
    from mindvl_jax.evaluation.run import _earlier_scores

    for content in (b"{", b"[]", b'{"tasks": []}', b'{"tasks": {"a": 1}}', b"\xff\xfe\x00"):
        path = Path(tmp_path / "scores.json")
        path.write_bytes(content)
        assert (
            _earlier_scores(path) == {"tasks": {}} and (tmp_path / "scores.json.damaged").exists() and not path.exists()
        )


def test_a_second_interrupt_does_not_wait_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested(1) and stop.reason == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
