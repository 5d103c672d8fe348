"""SIGKILL at random moments; a disk that fills. `MINDVL_KILLS=100` for as many as the project asks of itself."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

from mindvl_jax.checkpoints import checkpoint
from mindvl_jax.cli.run_hooks import train
from mindvl_jax.config import loader as config_loader

ROOT = Path(__file__).parents[2]


def test_a_run_killed_at_random_moments_ends_with_the_bits_of_one_that_nobody_touched():
    """In processes of its own: a fork of this one, whose devices are in use, would stop in a lock."""
    kills = os.environ.get("MINDVL_KILLS", "2")
    command = [
        sys.executable,
        str(Path(__file__).with_name("killing.py")),
        "--kills",
        kills,
        "--cache",
        os.environ["JAX_COMPILATION_CACHE_DIR"],
    ]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"kill {kills}:" in done.stdout and "came to its end: equal" in done.stdout, done.stdout


def test_a_disk_that_fills_during_a_save_ends_the_run_with_what_is_safe_and_room_lets_it_go_on(
    run_config, tmp_path, monkeypatch
):
    """No file may grow beyond 20 KB: what a full disk looks like to a save.

    In a process of its own, for Orbax's threads complain to the end.
    """
    monkeypatch.setattr("mindvl_jax.cli.run_hooks.write_report", lambda run_dir: Path(run_dir) / "report.html")
    plan = {"steps": 3, "gradient_accumulation": 2}
    saving = {"checkpoint": {"every_steps": 1, "keep": 9, "asynchronous": True}}
    untouched, filled = run_config(plan, name="untouched", **saving), run_config(plan, name="filled", **saving)
    train(untouched)
    train(filled, stop_after=1)
    (tmp_path / "config.yaml").write_text(config_loader.dump(filled))

    def small():
        return resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        [sys.executable, "train.py", "--config", str(tmp_path / "config.yaml")],
        cwd=ROOT,
        preexec_fn=small,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    told = done.stderr[done.stderr.rindex("mindvl train: ") :]
    assert (
        "no room left to write" in told
        and "the checkpoint of step 1 is whole, and run.resume: auto continues from it" in told
    )
    assert train(filled).finished

    def bits(config):
        return {path: np.asarray(value).tobytes() for path, value in checkpoint.load_params(config.run.dir)[1].items()}

    def losses(config):
        return [json.loads(line)["loss"] for line in Path(config.run.dir, "metrics.jsonl").read_text().splitlines()]

    assert losses(filled) == losses(untouched) and bits(filled) == bits(untouched)
