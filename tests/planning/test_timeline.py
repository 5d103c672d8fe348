"""A pipeline's timeline in the plan: idle time by simulation equals the formula; a picture is written."""

import pytest

from mindvl_jax.cli.__main__ import main
from mindvl_jax.planning import timeline
from tests.parallel.meshes import configuration

SETTINGS = {
    "gpipe": (),
    "1f1b": (),
    "interleaved": ("parallel.pipeline_chunks=2", "model.text.num_layers=8"),
}


@pytest.mark.parametrize("schedule", SETTINGS)
def test_the_idle_share_is_that_of_the_formula(schedule):
    """S - 1 bubbles of F + B by hand (1 + 3), over v chunks."""
    config = configuration({"stage": 4}, f"parallel.pipeline_schedule={schedule}", *SETTINGS[schedule])
    drawn, line = timeline.timeline_of(config, 8)
    idle = 3 * 4 / (2 if schedule == "interleaved" else 1)
    assert max(line.idle) == idle and drawn.micro_batches == 8
    share = f"{idle / (8 * 4 + idle):.0%}"
    assert f"{share} of a stage's time is idle (by formula {share})" in timeline.describe(drawn, line)


def test_split_weight_gradients_leave_half_of_the_idle_time_although_both_halves_recompute():
    drawn, line = timeline.timeline_of(configuration({"stage": 4}, "parallel.pipeline_schedule=zero_bubble"), 8)
    assert max(line.idle) == 6 and line.length - 6 == 8 * (1 + 2 + 2)
    assert "formula" not in timeline.describe(drawn, line)


def test_the_plan_tells_of_the_pipeline_and_draws_it(tmp_path, capsys):
    picture = tmp_path / "pipeline.png"
    where = ["--set", "mesh.stage=2", "backend=npu_bridge", "--timeline", str(picture)]
    assert main(["plan", "--config", "configs/smoke.yaml", *where]) == 0
    out = capsys.readouterr().out
    assert "1f1b over 2 stages, 4 micro-batches: 20% of a stage's time is idle (by formula 20%)" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_timeline_without_stages_is_refused(capsys):
    assert main(["plan", "--config", "configs/smoke.yaml", "--set", "mesh.data=1", "--timeline", "x.png"]) == 2
    assert "mesh.stage is 1" in capsys.readouterr().err
