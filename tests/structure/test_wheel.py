"""Check that the wheel holds every file of the packages, and that all its modules import away from the repository."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORT_ALL = """
import importlib, json, pkgutil
failed = {}
for top in ("mindvl_jax", "npu_bridge"):
    for module in pkgutil.walk_packages(importlib.import_module(top).__path__, top + "."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            failed[module.name] = str(error)
print(json.dumps(failed))
"""


def tracked() -> list[str]:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [
        name for name in listed.stdout.split("\0") if name and not name.startswith(("tests/", "benchmarks/", "docs/"))
    ]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """Site folder of a wheel built from a copy: setuptools leaves `build/lib` beside its sources, and takes stale files
    from it.
    """
    folder, sources = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("sources")
    for name in tracked():
        if (ROOT / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, sources / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(sources),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_holds_every_file_of_the_packages(unpacked):
    wanted = [name for name in tracked() if name.startswith(("mindvl_jax/", "npu_bridge/")) and (ROOT / name).is_file()]
    missing = [name for name in wanted if not (unpacked / name).exists()]
    assert not missing, f"add these to [tool.setuptools.package-data]: {missing}"


def test_every_module_of_a_wheel_imports_and_the_command_runs(unpacked, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    failed = json.loads(done.stdout.splitlines()[-1])
    failed.pop("mindvl_jax.evaluation.lmms_plugin", None)  # needs lmms_eval, which only its users install
    assert not failed, failed
    command = "import sys; from mindvl_jax.cli.main import main; sys.exit(main(['--help']))"
    helped = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert helped.returncode == 0 and "generate" in helped.stdout, helped.stderr[-2000:]
