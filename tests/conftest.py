"""The whole suite runs on the CPU with eight host devices, set before jax is imported anywhere; subprocesses inherit it.

Most of a test's time is compiling, and most programs are small: LLVM optimises little, and what was compiled once is kept for the
session, so that a program which several tests or processes build anew is read back.
"""

import atexit
import gc
import importlib.metadata
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# On a crowded machine the last of eight threads may come late to an exchange: XLA ends the process after 40 seconds.
FLAGS = ["--xla_force_host_platform_device_count=8"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag that XLA does not know ends the process, and these come and go
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

# A run sees the programs of the bridge that it wrote itself, not those of the user's cache folder.
if "NPU_BRIDGE_CACHE" not in os.environ:
    folder = tempfile.mkdtemp(prefix="programs-for-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["NPU_BRIDGE_CACHE"] = folder

# Modules that take longest (half a minute and more), longest first. Processes share a session by modules: a long one that begins late
# leaves the others without work at the end. The rest follow as they are collected.
LONGEST = (
    "training/test_run", "training/test_backend", "bridge/test_operations", "training/test_kill", "training/test_compare_command", "planning/test_plan",
    "training/test_profile", "bridge/test_training", "bridge/test_launch", "parity/test_logits_and_gradients", "bridge/test_public_programs", "models/test_mindvl",
    "benchmarks/test_cases", "inference/test_generator", "ops/test_values", "evaluation/test_evaluate_command",
    # of the conformance tier
    "emulator/device/test_doctor", "emulator/device/test_mindvl", "emulator/device/test_steps", "emulator/device/test_distributed",
    "emulator/device/test_layers", "emulator/device/test_opinfo", "emulator/device/test_large",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    tests = os.path.dirname(__file__)
    items.sort(key=lambda item: place.get(os.path.splitext(os.path.relpath(item.path, tests))[0], len(place)))


def pytest_collection_finish():
    """Tracing makes so many objects that a fifteenth of its time goes into looking for cycles among all there are, the hundreds of
    thousands of the packages that tests import among them: these live as long as the process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
