"""Kills a training run with SIGKILL again and again and compares what comes out with a run that nobody touched.

    python tests/training/killing.py --kills 100

Moments are drawn at random: while a run starts, between and inside steps (micro-steps of an accumulation among them),
while a checkpoint is being written in the background, around the change of phase, while rows wait half packed. A run
that comes to its end is compared (every loss, every count of samples, the bits of parameters and moments), and killing
goes on with a new one.

Processes are forked from one that has imported everything and initialised no device: a start takes a second or two.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

LIMIT = 600.0  # seconds that one run may take on a busy machine


def forked(work: Callable[[], None], log: Path) -> int:
    """Process id of a child that does `work` and ends with exit code 0, or 1 and a trace in `log`."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("a") as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def require_success(child: int, log: Path) -> None:
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise AssertionError(f"a run ended by itself; the end of its log:\n{log.read_text()[-3000:]}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Read a finished run: (loss, gradient norm, tokens, samples, samples so far) of each step, and a digest of
    its last state.
    """

    steps: dict[int, tuple]
    digest: str


class Subject:
    """A run in a folder, trained by forked processes."""

    def __init__(self, mapping: dict, folder: Path, cache: str):
        self.mapping = {**mapping, "run": {**mapping["run"], "dir": str(folder)}}
        self.folder, self.cache = folder, cache
        self.log = folder.parent / f"{folder.name}.log"

    def _train(self) -> None:
        import jax

        from mindvl_jax.cli.run_hooks import train
        from mindvl_jax.config import loader as config_loader
        from mindvl_jax.evaluation import report

        jax.config.update("jax_compilation_cache_dir", self.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        report.write_report = lambda folder: (Path(folder) / "report.html").write_text("")
        train(config_loader.from_mapping(self.mapping))

    def start(self) -> int:
        return forked(self._train, self.log)

    def recorded(self) -> int:
        """Lines of metrics so far."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def where(self, before: int, begun: float) -> str:
        """Name what a start at time `begun`, with `before` recorded steps, was doing when it died, by the folder's
        files.
        """
        folder = self.folder / "checkpoints"
        names = [child.name for child in folder.iterdir() if child.stat().st_mtime >= begun] if folder.is_dir() else []
        if any(not name.isdigit() for name in names):
            return "writing a checkpoint"
        if self.recorded() <= before:
            return "before its first step"
        return f"training, {json.loads((self.folder / 'metrics.jsonl').read_text().splitlines()[-1])['phase']}"

    def outcome(self) -> Outcome:
        steps = {}
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["step"] in steps:
                raise AssertionError(f"step {record['step']} stands twice in {self.folder}")
            steps[record["step"]] = tuple(
                record[key] for key in ("loss", "grad_norm", "tokens", "samples", "samples_total", "tokens_total")
            )
        place = self.folder / "digest"

        def digest() -> None:
            import numpy as np

            from mindvl_jax.checkpoints import checkpoint

            hashed = hashlib.sha256()
            for path, value in sorted(checkpoint.load_params(str(self.folder))[1].items()):
                hashed.update(path.encode() + np.asarray(value).tobytes())
            newest = max(
                (child for child in (self.folder / "checkpoints").iterdir() if child.name.isdigit()),
                key=lambda child: int(child.name),
            )
            prints = next(
                json.loads(file.read_text())["fingerprints"]
                for file in (newest / "progress").iterdir()
                if '"fingerprints"' in file.read_text(errors="replace")
            )
            hashed.update(json.dumps(prints, sort_keys=True).encode())  # of the optimizer's moments too
            place.write_text(hashed.hexdigest())

        require_success(forked(digest, self.log), self.log)
        return Outcome(steps, place.read_text())


def compare(found: Outcome, expected: Outcome) -> None:
    if found.steps != expected.steps:
        different = [
            step
            for step in sorted({*found.steps, *expected.steps})
            if found.steps.get(step) != expected.steps.get(step)
        ]
        raise AssertionError(
            f"steps {different} differ: found {found.steps.get(different[0])}, expected "
            f"{expected.steps.get(different[0])} at step {different[0]}"
        )
    if found.digest != expected.digest:
        raise AssertionError("losses are equal, but the bits of the last checkpoint differ")


def kill_again_and_again(
    mapping: dict, folder: Path, cache: str, *, kills: int, seed: int, say: Callable[[str], None] = lambda text: None
) -> dict[str, int]:
    """Kills runs of `mapping` until `kills` have died, comparing each that lives to its end.

    Returns how often each moment was hit.
    """
    require_no_devices()
    expected_run = Subject(mapping, folder / "untouched", cache)
    require_success(expected_run.start(), expected_run.log)
    expected = expected_run.outcome()
    dice = random.Random(seed)
    moments: collections.Counter[str] = collections.Counter()
    subject = Subject(mapping, folder / "killed", cache)
    died = finished = 0
    startup = 3.0
    while True:
        before, begun, wall = subject.recorded(), time.monotonic(), time.time()
        child = subject.start()
        alive = True
        if died < kills:
            in_start = dice.random() < 0.2
            # A share of the time to the first step of this start; or some steps later, and then anywhere inside one.
            until = begun + dice.uniform(0, startup) if in_start else begun + LIMIT
            lines = 10**9 if in_start else before + dice.randint(1, 4)
            while time.monotonic() < until and subject.recorded() < lines and alive:
                time.sleep(0.003)
                alive = os.waitpid(child, os.WNOHANG)[0] == 0
            if alive and not in_start:
                startup = 0.8 * startup + 0.2 * (time.monotonic() - begun)
                time.sleep(dice.uniform(0, 0.3))
                alive = os.waitpid(child, os.WNOHANG)[0] == 0
            if alive:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                died += 1
                moment = subject.where(before, wall)
                moments[moment] += 1
                say(f"kill {died}: {moment}, {subject.recorded()} steps recorded")
                continue
        elif alive:
            require_success(child, subject.log)
        if not (subject.folder / "report.html").exists():
            raise AssertionError(f"a run ended by itself; the end of its log:\n{subject.log.read_text()[-3000:]}")
        compare(subject.outcome(), expected)
        finished += 1
        say(f"a run that was killed on its way came to its end: equal ({died} kills so far)")
        if died >= kills:
            return {**moments, "runs compared": finished}
        shutil.rmtree(subject.folder)


def require_no_devices() -> None:
    import grain  # noqa: F401  (what a run imports late, imported once for all children)
    import pyarrow.parquet  # noqa: F401
    from jax._src import xla_bridge

    import mindvl_jax.cli.run_hooks  # noqa: F401

    if xla_bridge._backends:
        raise RuntimeError("this process has initialised its devices; a fork of it would stop in a lock")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", help="folder of compiled programs; default: one of its own")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import configuration, write_data, write_tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tokenizer(folder)
        write_data(folder)
        mapping = configuration(
            folder, folder / "unused", *PHASES, checkpoint=CHECKPOINTS, data={"cache_examples": False}
        )
        print(
            kill_again_and_again(
                mapping,
                folder,
                args.cache or str(folder / "xla"),
                kills=args.kills,
                seed=args.seed,
                say=lambda text: print(text, flush=True),
            )
        )


PHASES = (
    {"train": ["projector/**"], "steps": 3},
    {"steps": 7, "gradient_accumulation": 2, "schedule": "cosine"},
)  # those of test_run.py: compiled once for both
CHECKPOINTS = {"every_steps": 2, "keep": 2, "asynchronous": True}

if __name__ == "__main__":
    main()
