"""The trainer on npu_bridge against the trainer on XLA: losses, metrics, checkpoints, phases, accumulation, several
processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from mindvl_jax.checkpoints import checkpoint
from mindvl_jax.cli.run_hooks import train
from mindvl_jax.config import families
from mindvl_jax.config import loader as config_loader
from mindvl_jax.config.schema import MeshConfig
from mindvl_jax.core import processor
from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel.distributed import launched_processes
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.training.backend import make_backend
from mindvl_jax.training.xla_backend import compiler_options, matmul_precision

ROOT = Path(__file__).parents[2]
# The program of one step, and the three of accumulation; a border between phases that train different parts.
PHASES = (
    {"steps": 2, "learning_rate": 1e-3},
    {"train": ["projector/**"], "steps": 2, "gradient_accumulation": 2, "learning_rate": 1e-3},
)
# Both sides compute in float32 from the same bits and differ in the order of additions alone: some 1e-7 of a loss at
# first, and what four updates of AdamW make of it.
LOSS, NORM = 1e-5, 1e-4


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("mindvl_jax.cli.run_hooks.write_report", lambda run_dir: Path(run_dir) / "report.html")


def on(mapping, folder, backend, **run):
    """The configuration of a run of its own on a back end."""
    changed = json.loads(json.dumps(mapping))
    changed["run"] |= {"dir": str(folder), **run}
    changed["backend"] = backend
    return config_loader.from_mapping(changed)


@pytest.fixture(scope="module")
def xla_run(tmp_path_factory):
    """The whole run on XLA, once for all tests, with a checkpoint in the middle of each phase."""
    holder = {}

    def get(run_mapping):
        if not holder:
            mapping = run_mapping(*PHASES, name="x", checkpoint={"every_steps": 1, "keep": 9})
            holder["config"] = on(mapping, tmp_path_factory.mktemp("xla") / "run", "xla")
            holder["mapping"] = mapping
            train(holder["config"])
        return holder["mapping"], holder["config"]

    return get


def assert_alike(got, want):
    assert [line["step"] for line in got] == [line["step"] for line in want]
    for a, b in zip(got, want):
        assert a.keys() == b.keys(), f"step {a['step']}: {sorted(a.keys() ^ b.keys())}"
        for name, tolerance in (("loss", LOSS), ("grad_norm", NORM)):
            relative = abs(a[name] - b[name]) / abs(b[name])
            assert relative <= tolerance, (
                f"step {a['step']}: {name} {a[name]} and {b[name]} differ by {relative:.2e} (allowed {tolerance:.0e})"
            )
        for name in (
            "tokens",
            "label_tokens",
            "samples",
            "patches",
            "flops",
            "tokens_total",
            "learning_rate",
            "applied",
            "phase",
        ):
            assert a[name] == b[name], f"step {a['step']}: {name} is {a[name]}, expected {b[name]}"


def relative_distance(a, b):
    """L2 distance of two flat parameter dicts, relative to the second."""
    a, b = ({path: np.asarray(value, np.float64) for path, value in x.items()} for x in (a, b))
    assert a.keys() == b.keys()
    return (sum(np.sum((a[p] - b[p]) ** 2) for p in a) / sum(np.sum(b[p] ** 2) for p in b)) ** 0.5


@pytest.mark.parametrize(
    "changed, eigen",
    [
        ({"compute_dtype": "float32"}, True),
        ({"compute_dtype": "bfloat16"}, False),
        ({"compute_dtype": "float32", "matmul_precision": "bfloat16"}, False),
    ],
)
def test_float32_products_on_a_cpu_are_eigens_and_those_of_bfloat16_are_not(changed, eigen):
    options = compiler_options(
        families.preset("mindvl-tiny").model_copy(update=changed), make_mesh(MeshConfig(), jax.devices()[:1])
    )
    x = (
        jax.ShapeDtypeStruct((256, 128), changed["compute_dtype"]),
        jax.ShapeDtypeStruct((128, 256), changed["compute_dtype"]),
    )
    product = jax.jit(
        lambda x, y: jax.lax.dot(x, y, preferred_element_type="float32"), compiler_options=options or None
    )
    assert ("ynn" not in product.lower(*x).compile().as_text()) == eigen


def test_a_run_through_the_bridge_writes_the_metrics_and_checkpoints_of_xla(
    xla_run, run_mapping, tmp_path, read_metrics
):
    mapping, on_xla = xla_run(run_mapping)
    on_bridge = on(mapping, tmp_path / "bridge", "npu_bridge")
    assert train(on_bridge).finished
    assert_alike(read_metrics(on_bridge), read_metrics(on_xla))

    def steps(config):
        return sorted(child.name for child in Path(config.run.dir, "checkpoints").iterdir())

    assert steps(on_bridge) == steps(on_xla) == ["1", "2", "3", "4"]
    distance = relative_distance(
        checkpoint.load_params(on_bridge.run.dir)[1], checkpoint.load_params(on_xla.run.dir)[1]
    )
    assert distance <= 1e-5, f"parameters after four steps differ by {distance:.2e} (L2, relative)"


def first_phase(mapping):
    """The configuration cut to its first phase, whose steps are those of the whole run."""
    cut = json.loads(json.dumps(mapping))
    del cut["training"]["phases"][1:]
    return cut


def without_compilation(lines):
    """A run that continues compiles again; the first step of a process says so."""
    return [{name: value for name, value in line.items() if name != "includes_compilation"} for line in lines]


@pytest.mark.parametrize("first, second", [("xla", "npu_bridge"), ("npu_bridge", "xla")])
def test_a_run_begun_on_one_back_end_continues_on_the_other(
    xla_run, run_mapping, tmp_path, read_metrics, first, second
):
    mapping, on_xla = xla_run(run_mapping)
    result = train(on(first_phase(mapping), tmp_path / "run", first), stop_after=1)
    assert (result.step, result.finished) == (1, False)
    config = on(first_phase(mapping), tmp_path / "run", second)
    assert train(config).finished
    assert_alike(without_compilation(read_metrics(config)), without_compilation(read_metrics(on_xla)[:2]))


def launch(tmp_path, mapping, processes, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(mapping))
    command = [
        sys.executable,
        "-m",
        "npu_bridge.launch",
        "--nproc",
        str(processes),
        str(ROOT / "train.py"),
        "--config",
        str(path),
        "--set",
        *overrides,
    ]
    cache = jax.config.jax_compilation_cache_dir or str(tmp_path / "cache")
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
        "OMP_NUM_THREADS": "1",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "NPU_BRIDGE_TIMEOUT": "240",
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)


def test_four_processes_give_the_losses_of_one_and_xla_continues_what_they_saved(
    xla_run, run_mapping, tmp_path, read_metrics
):
    mapping, on_xla = xla_run(run_mapping)
    own = first_phase(mapping)
    own["run"]["dir"] = str(tmp_path / "run")
    done = launch(tmp_path, own, 4, "backend=npu_bridge", "mesh.fsdp=2", "mesh.tensor=2")
    assert done.returncode == 0, done.stdout + done.stderr
    want = without_compilation(read_metrics(on_xla)[:2])
    assert_alike(without_compilation(read_metrics(on(own, tmp_path / "run", "xla"))), want)
    # Their checkpoint in the middle, on XLA in one process.
    resumed = on(own, tmp_path / "resumed", "xla", resume=str(tmp_path / "run" / "checkpoints" / "1"))
    assert train(resumed).finished
    assert_alike(without_compilation(read_metrics(resumed)), want[1:])


def test_a_mesh_larger_than_the_processes_is_refused(run_mapping, tmp_path):
    mapping = run_mapping({"steps": 1}, mesh={"fsdp": 2})
    with pytest.raises(UserError, match="mesh data 1 x fsdp 2 x tensor 1 needs 2 devices, found 1"):
        train(on(mapping, tmp_path / "run", "npu_bridge"))


def test_processes_joined_in_the_way_of_xla_are_refused(run_config, monkeypatch):
    config = run_config(
        {"steps": 1}, distributed={"coordinator": "localhost:1", "processes": 1, "process_id": 0}
    ).model_copy(update={"backend": "npu_bridge"})
    with pytest.raises(UserError, match="npu_bridge.launch --nproc"):
        make_backend(config).join()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UserError, match="WORLD_SIZE='many'"):
        launched_processes()


@pytest.mark.parametrize(
    "flags, precision",
    [({"avx2"}, "default"), ({"avx2", "avx512_bf16"}, "bfloat16"), ({"amx_bf16"}, "bfloat16"), (set(), "default")],
)
def test_auto_precision_takes_bfloat16_products_only_where_the_processor_has_units_for_them(
    run_config, monkeypatch, flags, precision
):
    monkeypatch.setattr(processor, "flags", lambda: frozenset(flags))
    config = run_config({"steps": 1}, model={"matmul_precision": "auto", "compute_dtype": "float32"})
    assert matmul_precision(config.model) == precision
    with make_backend(config).precision():
        assert (jax.config.jax_default_matmul_precision == "bfloat16") == (precision == "bfloat16")
    eigen = "xla_cpu_experimental_ynn_fusion_type" in compiler_options(
        config.model, make_mesh(MeshConfig(), jax.devices()[:1])
    )
    assert eigen == (precision == "default"), "float32 products are Eigen's"


def test_products_in_bfloat16_are_torchs_own_setting_and_end_with_the_run(run_config):
    import torch

    config = run_config({"steps": 1}, model={"matmul_precision": "bfloat16"}).model_copy(
        update={"backend": "npu_bridge"}
    )
    before = torch.get_float32_matmul_precision()
    with make_backend(config).precision():
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
