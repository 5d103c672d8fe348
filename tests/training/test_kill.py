"""SIGKILL at random moments; a disk that fills. `MINDVL_KILLS=100` for as many as the project asks of itself."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_run_killed_at_random_moments_ends_with_the_bits_of_one_that_nobody_touched(compilation_cache):
    """In processes of its own: a fork of this one, whose devices are in use, would stop in a lock."""
    kills = os.environ.get("MINDVL_KILLS", "3")
    command = [sys.executable, str(Path(__file__).with_name("killing.py")), "--kills", kills, "--cache", compilation_cache]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"kill {kills}:" in done.stdout and "came to its end: equal" in done.stdout, done.stdout
