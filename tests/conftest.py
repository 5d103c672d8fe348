"""Run the suite on the CPU with eight host devices, set before jax is imported; subprocesses inherit it.

Most of a test's time is compilation of small programs: LLVM optimises little, and compiled programs are cached for the
session, so that a program which several tests or processes build is compiled once.
"""

import atexit
import gc
import importlib.metadata
import os
import pathlib
import shutil
import sys
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# On a loaded machine the last of eight threads may reach a collective late; XLA aborts the process after 40 seconds.
FLAGS = ["--xla_force_host_platform_device_count=8"]
if importlib.metadata.version("jaxlib").startswith(
    "0.10."
):  # XLA aborts on unknown flags, and these differ between versions
    FLAGS.append("--xla_cpu_collective_call_terminate_timeout_seconds=600")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="compiled-for-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Keep the user's cache of bridge programs out of the tests.
if "NPU_BRIDGE_CACHE" not in os.environ:
    folder = tempfile.mkdtemp(prefix="programs-for-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["NPU_BRIDGE_CACHE"] = folder

# Slowest modules (half a minute and more), slowest first. Workers take whole modules: a slow one that starts late
# leaves the other workers idle at the end. The rest follow in order of collection.
LONGEST = (
    "training/test_run", "training/test_backend", "bridge/test_operations", "training/test_kill",
    "training/test_compare_command", "planning/test_plan",
    "training/test_profile", "bridge/test_training", "bridge/test_launch", "parity/test_logits_and_gradients",
    "bridge/test_public_programs", "models/test_mindvl",
    "benchmarks/test_cases", "inference/test_generator", "ops/test_values", "evaluation/test_evaluate_command",
    # of the conformance tier
    "emulator/device/test_doctor", "emulator/device/test_mindvl", "emulator/device/test_steps",
    "emulator/device/test_distributed",
    "emulator/device/test_layers", "emulator/device/test_opinfo", "emulator/device/test_large",
    )  # fmt: skip


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    tests = os.path.dirname(__file__)
    items.sort(key=lambda item: place.get(os.path.splitext(os.path.relpath(item.path, tests))[0], len(place)))


def pytest_collection_finish():
    """Exclude imported packages from garbage collection: their hundreds of thousands of objects live as long as the
    process, and walking them takes a fifteenth of the time of tracing.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


# Linux gives a process 65,530 memory maps (vm.max_map_count), and XLA's compiled programs take several each: a worker
# that holds the programs of the whole suite reaches the limit near its end, and XLA dies of a segmentation fault.
MOST_MAPS = 20_000


def memory_maps():
    maps = pathlib.Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture(scope="module", autouse=True)
def bounded_memory_maps():
    """Drop JAX's compiled programs after a module when they hold too many memory maps; the files of the compilation
    cache stay.
    """
    yield
    if "jax" in sys.modules and memory_maps() > MOST_MAPS:
        sys.modules["jax"].clear_caches()
        gc.collect()
