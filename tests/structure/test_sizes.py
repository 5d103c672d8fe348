"""Check sizes: functions up to 60 lines and files up to 800, measured after `ruff format`, docstrings aside.

A longer function stands in LONG_TODAY with its reason. An entry that no longer applies fails the test.
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FUNCTION, FILE = 60, 800
SHORT = 50  # an entry goes once its function is this short; between the two, line breaks decide
LONG_TODAY = {
    # One program or one table: parts would only pass the same ten names around.
    "benchmarks/cases/operators.py operators": "the table of operators",
    "mindvl_jax/training/step.py make_programs": "the programs of a step share their shardings",
    "mindvl_jax/inference/programs.py decode": "the body of one device loop",
    "mindvl_jax/weights/mindspeed/layout.py items": "the table of a published layout",
    "npu_bridge/jaxcompat.py define_operator": "one primitive with all its rules",
    "npu_bridge/runtime/index_ops.py scatter_": "one operation with all its modes",
    # To be split.
    "benchmarks/cases/operators.py compare": "",
    "benchmarks/cases/checkpoint.py _stall": "",
    "benchmarks/cases/checkpoint.py checkpoint_case": "",
    "benchmarks/cases/data.py loader_case": "",
    "benchmarks/cases/generation.py generation_case": "",
    "benchmarks/cases/gpu.py compare_on_gpu": "",
    "benchmarks/generation.py build": "",
    "benchmarks/generation.py main": "",
    "benchmarks/ours.py __init__": "",
    "mindvl_jax/cli/score.py score": "",
    "mindvl_jax/models/vision_language/example.py _build": "",
    "mindvl_jax/parity/samples.py pack": "",
    "mindvl_jax/training/phase_loop.py run": "",
    "mindvl_jax/weights/adapters.py _published": "",
    "mindvl_jax/weights/adapters.py _take_linear": "",
    "npu_bridge/compiler/memory.py loop": "",
    "npu_bridge/compiler/passes/collectives.py _merge_sums": "",
    "npu_bridge/compiler/passes/overlap.py _start_where_the_operand_is": "",
    "npu_bridge/compiler/passes/collectives.py _scatter": "",
    "npu_bridge/runtime/api.py _abstract": "",
}


@pytest.fixture(scope="module")
def formatted(tmp_path_factory):
    """A formatted copy of the sources, so that the measure does not depend on how lines are broken."""
    folder = tmp_path_factory.mktemp("formatted")
    for top in ("mindvl_jax", "npu_bridge", "examples", "benchmarks"):
        for path in (ROOT / top).rglob("*.py"):
            (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / path.relative_to(ROOT))
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    ruff = Path(sys.executable).with_name("ruff")
    done = subprocess.run([str(ruff), "format", "--quiet", "."], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if text else 0)


def test_functions_are_short_or_have_a_reason(formatted):
    found: dict[str, int] = {}
    for path in formatted.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.relative_to(formatted).as_posix()} {node.name}"
                found[name] = max(found.get(name, 0), lines_of(node))
    new = {name: lines for name, lines in found.items() if lines > FUNCTION and name not in LONG_TODAY}
    assert not new, f"split these functions, or give a reason in LONG_TODAY: {new}"
    stale = sorted(name for name in LONG_TODAY if found.get(name, 0) <= SHORT)
    assert not stale, f"delete these entries, the functions are short now: {stale}"


def test_files_are_short(formatted):
    found = {
        path.relative_to(formatted).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in formatted.rglob("*.py")
    }
    long = {name: lines for name, lines in found.items() if lines > FILE}
    assert not long, f"split these files: {long}"
