"""`mindvl plan` equals live arrays, formulas by hand, and the compilers' plans of the trainer's own programs."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindvl_jax.cli import plan as command
from mindvl_jax.config import loader as config_loader
from mindvl_jax.core.devices import known_memory, limit_of, parse_memory
from mindvl_jax.core.errors import UserError
from mindvl_jax.models.loading import batch_spec
from mindvl_jax.models.outline import outline_of
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.parallel.rules import row_sharding
from mindvl_jax.planning import alternatives, peak, phase
from mindvl_jax.planning.alternatives import Change
from mindvl_jax.planning.phase import (
    BATCH,
    EMA,
    FROZEN,
    GRADIENTS,
    MOMENTS,
    OLD_MOMENTS,
    PARAMETERS,
    Measured,
    Planner,
    ProgramBytes,
)
from mindvl_jax.training.state import initial_params, split_trained, start_phase

SMOKE = "configs/smoke.yaml"
BRIDGE = ("backend=npu_bridge", "training.ema_decay=null")


def load(*overrides):
    return config_loader.load(SMOKE, ["training.phases[0].rows=8", *overrides])


def nothing(config, indexes):
    """Stand-in for the compiler where none is needed."""
    return [Measured({"train_step": ProgramBytes(0, 0)}) for _ in indexes]


def on_one_device(tree):
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards if shard.device == first
    )


@pytest.mark.parametrize(
    "mesh",
    [("mesh.fsdp=1",), ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"), ("mesh.fsdp=4", "mesh.tensor=2")],
    ids=["alone", "2x2x2", "fsdp 4 x tensor 2"],
)
def test_state_and_batch_are_the_bytes_of_live_arrays_on_a_device(mesh):
    config = load(*mesh, 'training.phases[0].train=["projector/**", "language/**"]')
    rows = Planner(config, nothing).fixed_rows(0)
    outline, live_mesh = outline_of(config.model), make_mesh(config.mesh)
    trained, frozen = split_trained(list(outline.shapes), config.training.phases[0].train, "train")
    state = start_phase(initial_params(outline, live_mesh, 0), trained, frozen, live_mesh)
    batch = jax.device_put(batch_spec(config, config.training.phases[0]).empty(), row_sharding(live_mesh))
    found = {
        PARAMETERS: on_one_device(state.trained),
        FROZEN: on_one_device(state.frozen),
        MOMENTS: on_one_device(state.opt_state),
        BATCH: 2 * on_one_device(batch),
    }
    assert {name: rows[name] for name in found} == found


COUNTER = 4  # bytes of the optimizer's own count of updates, an int32


def test_adamw_in_float32_takes_sixteen_bytes_a_trained_parameter_and_four_a_frozen_one():
    config = load('training.phases[0].train=["language/**"]', "training.ema_decay=0.99")
    planner = Planner(config, nothing)
    rows, shapes = planner.fixed_rows(0), planner.outline.shapes

    def count(part):
        return sum(math.prod(s.shape) for path, s in shapes.items() if path.startswith(part))

    trained, frozen = count("language/"), count("vision/") + count("projector/")
    assert rows[PARAMETERS] + rows[MOMENTS] + rows[GRADIENTS] == 16 * trained + COUNTER
    assert rows[FROZEN] == 4 * frozen and rows[EMA] == 4 * (trained + frozen)


def test_published_eight_billion_model_on_64_devices_has_the_arithmetic_of_its_shards():
    config = config_loader.load("configs/mindvl-8b.yaml", ["mesh.fsdp=64", "backend=npu_bridge"])
    plan = Planner(config, nothing).plan([1])[0]
    # 8.19 G of Qwen3-8B, 0.63 G of the 3,420-wide tower, 47 M of the projector.
    assert 8.85e9 < plan.parameters == plan.trained < 8.90e9
    even = 12 * plan.parameters / 64
    # Vectors and what 64 does not divide lie whole on every device: here the projector above all.
    assert even < plan.rows[PARAMETERS] + plan.rows[MOMENTS] < 1.25 * even


@pytest.fixture(scope="module")
def measured():
    """The bridge's and XLA's plans of one phase on 2 x 2 x 2."""
    overrides = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "training.phases[0].gradient_accumulation=2")
    bridge = load(*overrides, *BRIDGE)
    return {
        "npu_bridge": (bridge, peak.measure_bridge(bridge, 0)),
        "xla": (load(*overrides), peak.measure_xla(load(*overrides), 0)),
    }


@pytest.mark.parametrize("backend", ["npu_bridge", "xla"])
def test_arguments_that_the_compiler_counts_are_those_of_the_arithmetic(measured, backend):
    config, found = measured[backend]
    planner = Planner(config, nothing)
    parts, rows = planner.parts[0], planner.fixed_rows(0)
    state, batch, gradients = (
        rows[PARAMETERS] + rows.get(FROZEN, 0) + rows[MOMENTS],
        phase.local_bytes(parts.batch),
        rows[GRADIENTS] // 2,
    )
    # Scalars: counters of the state, sums of the totals, the rate; jit drops what a program does not read.
    said = {"accumulate": state - rows[MOMENTS] + gradients + batch, "update": state + gradients}
    for name, least in said.items():
        program = found.programs[name]
        # accumulate does not read the moments, and jit drops them.
        assert least - 4096 <= program.arguments <= least + rows[MOMENTS] + 4096, (
            f"{backend} {name}: {program.arguments}, by hand {least}"
        )
        assert program.peak > program.arguments


def test_rows_of_a_plan_add_up_to_resident_memory_and_the_temporaries_of_the_highest_program(measured):
    for backend, (config, found) in measured.items():
        plan = Planner(config, lambda config, indexes: [found for _ in indexes]).plan([0])[0]
        rows = Planner(config, nothing).fixed_rows(0)
        resident = sum(rows.values()) - rows[GRADIENTS] + rows[GRADIENTS] // 2
        want = resident + max(program.temporaries for program in found.programs.values()) + sum(found.extra.values())
        assert plan.total == want, backend


def test_step_that_runs_on_the_bridge_has_the_plan_that_was_told(measured):
    """The trainer's own back end lowers the same program."""
    from mindvl_jax.planning.phase import lowerings
    from mindvl_jax.training.bridge_backend import Bridge

    config = load(*BRIDGE)
    mesh = make_mesh(config.mesh)

    def compile(function, **options):
        return Bridge(config).compile(function, mesh=mesh, **options)

    ((_, lowered),) = lowerings(config, 0, mesh, compile)
    told = peak.measure_bridge(config, 0).programs["train_step"]
    assert (told.arguments, told.peak) == (lowered.memory()["argument_bytes"], lowered.memory()["peak_bytes"])


def test_xla_plan_of_another_process_is_that_of_this_one(measured):
    config, here = measured["xla"]
    (apart,) = peak.measure_xla_apart(config, [0])
    assert apart.programs == here.programs


def test_phase_that_starts_beside_the_old_moments_is_counted_at_its_hand_over():
    config = load('training.phases[1].train=["language/**"]')
    plan = Planner(config, nothing).plan([1])[0]
    assert plan.highest == "hand-over" and plan.rows[OLD_MOMENTS] == 8 * plan.parameters + COUNTER
    kept = load('training.phases[1].train=["**"]', "training.phases[1].keep_optimizer=true")
    assert Planner(kept, nothing).plan([1])[0].highest == "train_step"


def test_without_a_mesh_the_one_that_training_would_choose_is_planned():
    rows = [f"training.phases[{index}].rows=8" for index in range(4)]
    meshes = [command.load(SMOKE, rows, 8, memory).mesh for memory in (2**34, 2**23, None)]
    assert [(mesh.data, mesh.fsdp) for mesh in meshes] == [(8, 1), (1, 8), (1, 8)], "small, too large, unknown"
    assert command.load(SMOKE, [], None).mesh.filled == command.load(SMOKE, [], 1).mesh.filled


def test_mesh_that_takes_what_is_left_asks_for_the_number_of_devices():
    config = load("mesh.fsdp=-1")
    with pytest.raises(UserError, match=r"mesh.fsdp=-1 .* --devices N"):
        phase.planned_mesh(config.mesh, None)
    assert phase.planned_mesh(config.mesh, 6).fsdp == 6
    with pytest.raises(UserError, match="needs 4 devices, found 2"):
        phase.planned_mesh(load("mesh.fsdp=4").mesh, 2)
    with pytest.raises(UserError, match="rows=8 .* = 16: use a multiple of 16"):
        Planner(load("mesh.fsdp=16"), nothing)


def test_memory_is_read_in_its_units_and_by_the_device_s_name():
    assert (
        parse_memory("64GiB") == 64 * 2**30
        and parse_memory("80 GB") == 80 * 10**9
        and parse_memory("24576MiB") == 24 * 2**30
    )
    assert known_memory("NVIDIA H100 80GB HBM3") == 81559 * 2**20 and known_memory("NVIDIA H200") > known_memory(
        "NVIDIA H20"
    )
    assert known_memory("Ascend910B4") == 32 * 2**30 and known_memory("ascend 910b") == 64 * 2**30
    for wrong in ("64 bananas", "GiB", "-3GiB"):
        with pytest.raises(UserError, match="such as 64GiB"):
            parse_memory(wrong)
    with pytest.raises(UserError, match="which of them NVIDIA A100 40GB, NVIDIA A100 80GB"):
        known_memory("NVIDIA A100")
    with pytest.raises(UserError, match="unknown.*--memory"):
        known_memory("Etch-a-Sketch")
    assert limit_of("10GB", None, margin=0.1, backend="npu_bridge").usable == 9 * 10**9
    assert limit_of(None, "NVIDIA H200", margin=0.1, backend="xla").usable < 0.76 * known_memory("NVIDIA H200")


def planned_by(formula):
    """A compiler's stand-in: temporaries by a formula over the phase's configuration."""
    return lambda config, indexes: [
        Measured({"train_step": ProgramBytes(0, formula(config, config.training.phases[index]))}) for index in indexes
    ]


def found_by_search(config, formula, usable):
    def planner_of(overrides):
        return Planner(load(*overrides), planned_by(formula))

    plans = Planner(config, planned_by(formula)).plan()
    tried = alternatives.search(config, plans, usable, planner_of)
    return plans, tried, [one for one in tried if one.fits], planner_of


def test_search_names_the_mildest_remat_that_fits_and_every_change_that_it_names_does_fit():
    kept = {"none": 400e6, "dots": 200e6, "attention": 100e6, "full": 10e6}

    def formula(config, phase):
        return int(kept[config.model.remat] * phase.rows / config.mesh.filled.fsdp / 8)

    _, _tried, fitting, planner_of = found_by_search(load(), formula, usable=int(150e6))
    named = [" ".join(one.change.overrides) for one in fitting]
    assert "model.remat=attention" in named and "model.remat=full" not in named
    assert any("gradient_accumulation=4" in name for name in named) and "mesh.fsdp=4" in " ".join(named)
    for one in fitting:
        assert max(plan.total for plan in planner_of(one.change.overrides).plan()) == one.bytes <= 150e6


def test_search_joins_changes_when_none_is_enough_alone():
    def formula(config, phase):
        return int(400e6 * (0.3 if config.model.remat == "full" else 1) * phase.rows / 8)

    _, _tried, fitting, _ = found_by_search(load(), formula, usable=int(30e6))
    assert len(fitting) == 1 and "model.remat=full" in fitting[0].change.overrides
    assert "training.phases[0].gradient_accumulation=8" in fitting[0].change.overrides


def test_search_says_why_a_change_cannot_help():
    _, tried, fitting, _ = found_by_search(load(), lambda config, phase: 10**9, usable=10**3)
    assert not fitting and {one.why_not for one in tried if one.bytes is not None} == {"its state alone is larger"}


def test_changes_keep_the_rows_of_a_step_where_they_say_so():
    config = load("mesh.fsdp=2", "training.phases[0].gradient_accumulation=3")
    for change in alternatives.families(config, [0])["micro-steps"]:
        changed = load("mesh.fsdp=2", *change.overrides).training.phases[0]
        assert changed.rows * changed.gradient_accumulation == 24
    more = alternatives._more_devices(
        load("training.phases[0].gradient_accumulation=4", "training.phases[0].rows=1"), 2
    )
    assert {"training.phases[0].rows=2", "training.phases[0].gradient_accumulation=2"} <= set(
        more.overrides
    ) and "phases[0]" not in more.cost
    assert (Change(("a=1", "b=2"), "x") + Change(("b=3",), "y")).overrides == ("a=1", "b=3")


def test_command_says_whether_it_fits_by_its_exit_code(capsys, monkeypatch):
    monkeypatch.setattr(
        peak,
        "measure",
        planned_by(
            lambda config, phase: int({"none": 2e9, "dots": 1e9, "attention": 1e9, "full": 1e8}[config.model.remat])
        ),
    )
    arguments = ["--config", SMOKE, "--devices", "1", "--memory"]
    assert ask([*arguments, "4GiB"]) == 0 and "does not fit" not in capsys.readouterr().out
    assert ask([*arguments, "1GiB"]) == 1
    said = capsys.readouterr().out
    assert "does not fit" in said and "--set model.remat=full" in said
    assert ask([*arguments, "1GiB", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["fits"] is False and next(one["set"] for one in record["tried"] if one["fits"]) == [
        "model.remat=full"
    ]
    assert ask(["--config", SMOKE]) == 0 and "No verdict" in capsys.readouterr().out
    with pytest.raises(UserError, match="give one of them"):
        ask([*arguments, "1GiB", "--device-kind", "TPU v4"])


def ask(arguments):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def test_abstract_batch_has_the_shapes_and_types_of_a_real_one():
    config = load()
    spec = batch_spec(config, config.training.phases[0])
    planned, real = phase.abstract_batch(spec, phase.abstract_mesh(config.mesh)), spec.empty()
    for name, value in real.fields().items():
        assert (getattr(planned, name).shape, np.dtype(getattr(planned, name).dtype)) == (value.shape, value.dtype), (
            name
        )
    assert jnp.dtype(planned.patches.dtype) == jnp.uint8
