"""The launcher: a rank that dies or hangs ends the job, ranks with different programs never start; torchrun does as
well.

That its ranks train together: tests/training/test_backend.py (four); that the first one's output comes as it is:
tests/doctor/test_checks.py.
"""

import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

SCRIPT = pathlib.Path(__file__).parent / "scripts" / "train_linear.py"
ROOT = pathlib.Path(__file__).parents[2]


def _launch(*command, **env):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NPU_BRIDGE_CACHE": "off", "XLA_FLAGS": ""} | env
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=environment, timeout=150, cwd=ROOT
    )
    return done, time.monotonic() - begin


def test_ranks_started_by_torchrun_train_together():
    from npu_bridge.launch import free_port

    where = ("--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    done, _ = _launch(
        "torch.distributed.run", "--nproc-per-node", "2", *where, str(SCRIPT), "nothing", JAX_PLATFORMS="cpu"
    )
    assert done.returncode == 0, done.stderr
    assert "gap" in done.stdout


def test_ranks_leave_together():
    # gloo aborts a rank whose peer closes its connections first, now and then, after all its work was done.
    done, _ = _launch("npu_bridge.launch", "--nproc", "2", str(SCRIPT), "late")
    assert done.returncode == 0, done.stderr
    ends = dict(re.findall(r"rank (\d) ends at ([\d.]+), in the group: False", done.stdout))
    [woke] = re.findall(r"rank 1 woke at ([\d.]+)", done.stdout)
    assert len(ends) == 2 and float(ends["0"]) >= float(woke), done.stdout


def test_a_rank_that_dies_ends_the_others_and_is_named():
    done, seconds = _launch("npu_bridge.launch", "--nproc", "2", str(SCRIPT), "die", NPU_BRIDGE_TIMEOUT="100")
    assert done.returncode == 7, done.stderr
    assert "npu_bridge.launch: rank 1 ended with exit code 7" in done.stderr
    # Far below the time-out of the collective: the others were ended, they did not wait.
    assert seconds < 80, f"took {seconds:.0f} s"


def test_a_rank_that_hangs_is_found_by_the_time_out_of_a_named_collective():
    done, seconds = _launch("npu_bridge.launch", "--nproc", "2", str(SCRIPT), "hang", NPU_BRIDGE_TIMEOUT="4")
    assert done.returncode != 0
    assert "CollectiveError: rank 0: all_reduce number" in done.stderr and "over ('data',)" in done.stderr, done.stderr
    assert seconds < 50, f"took {seconds:.0f} s"


def test_ranks_with_different_programs_stop_before_the_first_step():
    done, _ = _launch("npu_bridge.launch", "--nproc", "2", str(SCRIPT), "differ")
    assert done.returncode != 0
    assert "ranks compiled different programs for step" in done.stderr
    assert "on ranks [0]" in done.stderr and "on ranks [1]" in done.stderr


@pytest.mark.parametrize(
    "arguments, message", [(["--nproc", "0", "x.py"], "at least 1"), (["--nproc", "2", "missing.py"], "does not exist")]
)
def test_wrong_arguments_of_the_launcher_are_refused(arguments, message, capsys):
    from npu_bridge import launch

    with pytest.raises(SystemExit):
        launch.main(arguments)
    assert message in capsys.readouterr().err
