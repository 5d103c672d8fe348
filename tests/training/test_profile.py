"""Profiles of a running training: by block, asked for beforehand or while it trains."""

import json
import re
from pathlib import Path

import pytest

from mindvl_jax.cli.main import main
from mindvl_jax.cli.run_hooks import train
from mindvl_jax.config import loader as config_loader
from mindvl_jax.core.errors import UserError
from mindvl_jax.profiling import hlo, request, xla

ON_BRIDGE = {"backend": "npu_bridge"}
PROGRAM = """
HloModule jit_f

%inside (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %m = f32[4]{0} multiply(%p, %p), metadata={op_name="jit(f)/jvp(language)/layers/closed_call/mlp/mul"}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %dot.1 = f32[4]{0} dot(%a, %a), metadata={op_name="jit(f)/transpose(jvp(vision))/blocks/attention/dot_general"}
  %made = f32[4]{0} fusion(%dot.1), kind=kLoop, calls=%inside
  %copy.2 = f32[4]{0} copy(%dot.1)
  %all-reduce.3 = f32[4]{0} all-reduce(%made), to_apply=%inside, metadata={op_name="jit(f)/jvp(loss)/add"}
  %pair = (f32[4]{0}, f32[4]{0}) fusion(%a), kind=kLoop, metadata={op_name="jit(f)/optimizer/mul"}
  %loop.4 = (f32[4]{0}) while(%pair), condition=%when, body=%inside, metadata={op_name="jit(f)/jvp(loss)/while"}
  ROOT %r = f32[4]{0} add(%a, %a)
}
"""


def test_operations_belong_to_the_block_that_their_scopes_name():
    blocks = hlo.blocks_of_program(PROGRAM)
    assert blocks["dot.1"] == "vision attention, backward"
    assert blocks["made"] == "language mlp, forward"  # by what is inside
    assert blocks["copy.2"] == "vision attention, backward"  # by whom it copies
    assert blocks["all-reduce.3"] == "collectives"
    assert blocks["pair"] == "optimizer"
    assert blocks["r"] == "other"


def test_time_of_a_block_is_the_sum_of_its_operations():
    operations = {("jit_f", "dot.1"): 2.0, ("jit_f", "copy.2"): 0.5, ("jit_f", "made"): 1.0, ("jit_g", "dot.1"): 4.0}
    operations["jit_f", "loop.4"] = 8.0  # the time of what is inside of it, once more
    assert xla.by_block(operations, {"f": PROGRAM}) == {
        "vision attention, backward": 2.5,
        "language mlp, forward": 1.0,
        "other": 4.0,
    }


def assert_mostly_named(blocks):
    """Operations without a name take a tenth of the time at most.

    These are times of steps of some 40 ms, of which the machine may take ten for itself while an operation without a
    name runs; without scopes hardly anything would have a name.
    """
    named = sum(seconds for name, seconds in blocks.items() if name not in ("other", "host"))
    assert blocks.get("other", 0.0) < named, blocks


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_profile_of_given_steps_adds_up_and_names_the_blocks(run_config, accumulation):
    config = run_config({"steps": 4, "gradient_accumulation": accumulation}, profile={"steps": [3, 4]})
    train(config)
    (folder,) = Path(config.run.dir, "profiles").iterdir()
    assert folder.name == "00000003"
    record = json.loads((folder / "blocks.json").read_text())
    assert record["steps"] == 2
    # Shares of the wall by construction; what runs must be known by name but for a little.
    assert sum(record["blocks"].values()) == pytest.approx(record["seconds_per_step"], rel=0.02)
    for name in (
        "language mlp, forward",
        "language attention, backward",
        "vision attention, forward",
        "loss, forward",
        "optimizer",
    ):
        assert record["blocks"][name] > 0, record["blocks"]
    assert_mostly_named(record["blocks"])
    assert re.search(r"steps 3 to 4: [\d.]+ ms a step", (folder / "profile.txt").read_text())
    assert len(json.loads((folder / "memory.json").read_text())) > 0 and (folder / "profile.png").stat().st_size > 5000


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_profile_of_npu_bridge_adds_up_and_names_the_same_blocks(run_mapping, accumulation):
    mapping = run_mapping(
        {"steps": 3, "gradient_accumulation": accumulation}, profile={"steps": [2, 3]}, bridge={"device": "cpu"}
    )
    config = config_loader.from_mapping(mapping | ON_BRIDGE)
    train(config)
    (folder,) = Path(config.run.dir, "profiles").iterdir()
    record = json.loads((folder / "blocks.json").read_text())
    assert record["steps"] == 2 and record["notes"] == []
    assert sum(record["blocks"].values()) == pytest.approx(record["seconds_per_step"], rel=0.02)
    for name in (
        "language mlp, forward",
        "language attention, backward",
        "vision attention, forward",
        "loss, forward",
        "optimizer",
    ):
        assert record["blocks"][name] > 0, record["blocks"]
    assert_mostly_named(record["blocks"])
    assert len(json.loads((folder / "memory.json").read_text())) > 0 and (folder / "profile.png").stat().st_size > 5000
    # Under our names in torch's own trace, too, as often as the two steps entered them.
    events = json.loads((folder / "trace" / "trace.json").read_text())["traceEvents"]
    assert any(event["name"].endswith("layers/mlp") for event in events if event.get("cat") == "user_annotation")
    assert "aten::mm" in (folder / "trace" / "operators.txt").read_text()


def test_the_command_profiles_a_configuration_on_npu_bridge(run_mapping, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(run_mapping({"steps": 4}, bridge={"device": "cpu"}) | ON_BRIDGE))  # JSON is YAML
    assert main(["profile", "--config", str(path), "--steps", "2..2", "--out", str(tmp_path / "out")]) == 0
    assert "steps 2 to 2:" in capsys.readouterr().out
    assert [folder.name for folder in (tmp_path / "out" / "profiles").iterdir()] == ["00000002"]


def test_a_run_profiles_when_it_is_asked_and_once_only(run_config):
    config = run_config({"steps": 5})
    Path(config.run.dir).mkdir(parents=True)
    Path(config.run.dir, "config.yaml").write_text(config_loader.dump(config))
    request(Path(config.run.dir), 1)
    with pytest.raises(UserError, match="is not answered yet"):
        request(Path(config.run.dir), 1)
    train(config)
    assert [folder.name for folder in Path(config.run.dir, "profiles").iterdir()] == ["00000001"]
    assert not Path(config.run.dir, "profile-request.json").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        request(tmp_path, 3)


def test_steps_out_of_order_are_refused(run_mapping):
    with pytest.raises(UserError, match="the first step comes after the last"):
        config_loader.from_mapping(run_mapping({}, profile={"steps": [4, 3]}))
