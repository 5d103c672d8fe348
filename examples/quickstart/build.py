"""Build the quickstart data: `python -m examples.quickstart.build --out data/quickstart`.

The folder holds one parquet file for each source and split (`train/digits.parquet` ...), `id_table.json` (the compact
vocabulary), `standins/` (the stand-in benchmark sets, `examples.quickstart.standins`), `manifest.json` (counts, what is
held out, licences, blind scores, digests) and, in `contact/`, a sheet of images for each file, to look at. The same
arguments give the same files; a second call with them does nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.quickstart import assets, blind, contact, samples, vocabulary
from examples.quickstart.sources import SIZES, SOURCES, Piece, Source, make, pieces
from examples.quickstart.standins.build import build as build_standins
from mindvl_jax.config.schema import QuickstartDataConfig, TokenizerConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import replacing, write_text
from mindvl_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from mindvl_jax.evaluation import benchmarks

FORMAT = 2  # of the manifest
HELD_OUT = {
    "digits": "columns 80 to 99 of each class of the sheet (1,000 of 5,000 digits); writers are not known, so one may "
    "appear on both sides",
    "easyvqa": "the published test part, a fixed draw of its questions",
    "emoji": "all drawings by two artists (Fluent, OpenMoji); the names are the same 550",
    "words": f"{assets.TEST_WORDS} words and three font families (Comic Neue, EB Garamond, Cantarell)",
    "typeset": "as words, in ordinary setting",
    "charts": "whole tables: " + ", ".join(sorted(assets.TEST_TABLES)) + "; and the three font families",
}


def build(
    out: Path, size: str = "standard", seed: int = 0, processes: int | None = None, console: Console | None = None
) -> dict:
    """Build, or finds already built, and return the manifest.

    Args:
      processes: working processes; None takes one a core, at most 8; 0 works in this one.

    Raises:
      UserError: unknown size, or a package with material is missing.
    """
    if size not in SIZES:
        raise UserError(f"--size {size!r} is not known; choose one of {', '.join(SIZES)}")
    console = console or Console()
    fingerprint = _fingerprint(size, seed)
    known = _finished(out, fingerprint)
    if known is not None:
        console.print(f"{out}: up to date ({size}, seed {seed}, {known['samples']:,} samples)")
        return known
    began = time.monotonic()
    for split in ("train", "validation", "test"):
        (out / split).mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").unlink(missing_ok=True)  # written last: its presence means that everything is there

    standins, questions = _write_standins(out)
    table = vocabulary.id_table(questions)
    write_text(out / "id_table.json", json.dumps(table))
    tokenizer = load_tokenizer(TokenizerConfig(path=vocabulary.TOKENIZER, id_table=str(out / "id_table.json")))
    console.print(f"{out}: id_table.json, {len(table):,} ids")
    files = _write_sources(out, size, seed, processes, tokenizer, console)
    contact.write_sheets(out, files, 12 if size == "smoke" else 48)
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "size": size,
        "seed": seed,
        "samples": sum(file["samples"] for file in files.values()),
        "files": files,
        "standins": standins,
        "id_table": {"size": len(table), "tokenizer": vocabulary.TOKENIZER, **_describe(out / "id_table.json")},
        "held_out": HELD_OUT,
        "licences": "see ATTRIBUTIONS.md",
        "blind": blind.scores(out),
    }
    write_text(out / "manifest.json", json.dumps(manifest, indent=1))
    console.print(
        f"{out}: {manifest['samples']:,} samples in {len(files)} files, "
        f"{sum(file['bytes'] for file in files.values()) / 1e6:.0f} MB, {time.monotonic() - began:.0f} s"
    )
    return manifest


def prepare(config: QuickstartDataConfig) -> None:
    """Build the data that a configuration asks for; of several processes that start at once, one builds and the others
    wait.
    """
    out = Path(config.folder)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build(out, config.size)


def _write_standins(out: Path) -> tuple[dict[str, dict], list[str]]:
    """Write `standins/`; return its files as the manifest names them, and every question as an evaluation asks it."""
    counts = build_standins(out / "standins")
    # Without image marks: a word after `>` is tokenized differently.
    questions = [
        message["content"].replace("<image>", "")
        for task in counts
        for item in benchmarks.load_items(task, out / "standins")
        for message in item.messages
    ]
    paths = sorted((out / "standins").glob("*.parquet"))
    return {
        str(path.relative_to(out)): {
            "about": "stand-in benchmark set",
            "samples": pq.read_metadata(path).num_rows,
            **_describe(path),
        }
        for path in paths
    }, questions


def _write_sources(
    out: Path, size: str, seed: int, processes: int | None, tokenizer: Tokenizer, console: Console
) -> dict[str, dict]:
    work = pieces(size)
    files: dict[str, dict] = {}
    encoded: set[str] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("building", total=len(work))

        def tables(source: Source, results: Iterator[list[samples.Sample]]) -> Iterator:
            start = 0
            for made in results:
                for text in {text for sample in made for text in sample.texts()} - encoded:
                    tokenizer.encode(text)  # raises and names the text when the table cannot write it
                    encoded.add(text)
                yield samples.table(made, f"{source.split}/{source.name}", start)
                start += len(made)
                progress.advance(bar)
            files[source.path] = {"about": source.about, "samples": start}

        for number, results in _make_all(work, size, seed, processes):
            source = SOURCES[number]
            progress.update(bar, description=f"{source.path:28}")
            with replacing(out / source.path) as temporary:
                samples.write_parquet(tables(source, results), temporary)
            files[source.path] |= _describe(out / source.path)
    return files


def _make_all(
    work: Sequence[Piece], size: str, seed: int, processes: int | None
) -> Iterator[tuple[int, Iterator[list[samples.Sample]]]]:
    """(source index, its pieces' samples in order) for each source, made by several processes ahead of the writer."""
    processes = min(os.cpu_count() or 1, 8) if processes is None else processes

    def by_source(piece):
        return piece.source

    if processes == 0:
        for number, group in itertools.groupby(work, by_source):
            yield number, (make(piece, size, seed) for piece in group)
        return
    # spawn: a fork of a process that runs JAX's threads can hang.
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(make, piece, size, seed) for piece in work]
        results = iter(zip(work, futures))
        try:
            for number, group in itertools.groupby(results, lambda pair: pair[0].source):
                yield number, (_take(future) for _, future in group)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _take(future: concurrent.futures.Future) -> list[samples.Sample]:
    return future.result()


def _finished(out: Path, fingerprint: str) -> dict | None:
    """The manifest of a finished build with this fingerprint whose files are all there, whole."""
    try:
        manifest = json.loads((out / "manifest.json").read_text())
        if manifest["fingerprint"] != fingerprint:
            return None
        expected = {path: file["bytes"] for path, file in (manifest["files"] | manifest["standins"]).items()} | {
            "id_table.json": manifest["id_table"]["bytes"]
        }
        return manifest if all((out / path).stat().st_size == size for path, size in expected.items()) else None
    except (OSError, ValueError, KeyError):
        return None


def _fingerprint(size: str, seed: int) -> str:
    """Digest of all that the result depends on: arguments, this package's sources and material, drawing libraries."""
    digest = hashlib.sha256(json.dumps([FORMAT, size, seed]).encode())
    for package in ("numpy", "pillow", "pyarrow", "resvg-py", "easy-vqa"):
        try:
            digest.update(f"{package} {importlib.metadata.version(package)}".encode())
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"building the quickstart data needs the package {package!r}: `pip install {package}`, or "
                "run `make quickstart`, which installs what it needs"
            ) from None
    package = Path(__file__).parent
    sources = [*package.glob("*.py"), *(package / "standins").glob("*.py")]
    for file in sorted([*sources, *(path for path in assets.FOLDER.rglob("*") if path.is_file())]):
        digest.update(str(file.relative_to(package)).encode() + hashlib.sha256(file.read_bytes()).digest())
    digest.update(hashlib.sha256(Path(benchmarks.__file__).read_bytes()).digest())  # the stand-ins have its columns
    return digest.hexdigest()


def _describe(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.quickstart.build", description="Builds the quickstart data."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data/quickstart"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--size", choices=SIZES, default="standard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--processes", type=int, default=None, help="working processes (default: one a core, at most 8; 0: none)"
    )
    options = parser.parse_args(arguments)
    try:
        build(options.out, options.size, options.seed, options.processes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
