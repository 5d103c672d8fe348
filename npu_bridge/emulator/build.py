"""Build the emulated CANN libraries on first use, against the installed torch and torch_npu, into the user's cache.

Each build has a folder named by the hash of its inputs: sources, versions, compiler, flags. Objects are cached by the
hash of their dependencies, so a changed file only recompiles itself. `NPU_EMULATOR_KEEP_HEADER=1` also keeps the
precompiled header (hundreds of megabytes), for work on the operators.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from npu_bridge.emulator.environment import Toolchain, check
from npu_bridge.emulator.errors import EmulatorError

SOURCES = Path(__file__).parent / "src"
# Warnings of the vendor's headers are not ours to fix.
FLAGS = ("-std=c++20", "-fPIC", "-pthread", "-Wall", "-Wno-unused-function", "-D_GLIBCXX_USE_CXX11_ABI=1")
# Precompiled header of each library, and its optimisation level. Operators compile without optimisation: ATen does the
# work, this code runs for microseconds a call, and most time goes into compiling it.
RUNTIME, OPERATORS = "runtime/runtime.h", "opapi/operator.h"
LEVELS = {RUNTIME: ("-O1",), OPERATORS: ("-O0",)}
FIRST = "first.h"  # includes that header; g++ finds the precompiled form beside it
LIGHT = "opapi/light"  # empty headers that shadow expensive ones of torch
EMPTY = ("ge_runner", "graph", "acl_tdt_channel")  # linked by torch_npu, never called
ALIASES = {"hcomm": "hccl", "nnopbase": "opapi"}  # torch_npu looks up some functions of the latter there


@dataclasses.dataclass(frozen=True)
class Library:
    """One shared library: source folders and linked libraries."""

    name: str
    folders: tuple[str, ...]
    links: tuple[str, ...] = ()
    header: str = RUNTIME


LIBRARIES = (
    Library("ascendcl", ("runtime", "ascendcl")),
    Library("acl_op_compiler", ("compiler",), ("ascendcl",)),
    Library("hccl", ("hccl",), ("ascendcl",)),
    Library("opapi", ("opapi",), ("ascendcl", "hccl"), OPERATORS),
)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/npu_bridge/emulator` (by default in ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npu_bridge" / "emulator"


def source_files() -> list[Path]:
    return sorted(p for p in SOURCES.rglob("*") if p.suffix in (".cpp", ".h"))


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update((part.encode() if isinstance(part, str) else part) + b"\0")
    return digest.hexdigest()[:16]


def _base(toolchain: Toolchain) -> str:
    """Inputs of every object besides its sources."""
    return _digest(
        *FLAGS,
        *LEVELS[RUNTIME],
        *LEVELS[OPERATORS],
        toolchain.compiler_version,
        str(toolchain.torch),
        *(f"{k}={v}" for k, v in sorted(toolchain.versions.items())),
    )


def key_of(toolchain: Toolchain) -> str:
    """Hash of everything a build depends on."""
    files = [part for path in source_files() for part in (path.relative_to(SOURCES).as_posix(), path.read_bytes())]
    return _digest(_base(toolchain), sys.version.split()[0], Path(__file__).read_bytes(), *files)


def _keep(made: Path, kept: Path) -> None:
    """Move a file into the cache atomically: other processes may read at the same time."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    made.replace(kept)


def operator_names(torch_npu: Path) -> list[str]:
    """Names of all operators that the wheel can look up in libopapi.so, from the strings of its binary."""
    binary = (torch_npu / "lib" / "libtorch_npu.so").read_bytes()
    return sorted(
        {
            m.group(1).decode()
            for m in re.finditer(rb"(?<![A-Za-z0-9_])(acl(?:nn)?[A-Z][A-Za-z0-9_]*)GetWorkspaceSize\0", binary)
        }
    )


def unknown_source(names: list[str]) -> str:
    """Weak symbols for every operator, so that those not implemented refuse by name.

    In assembly, because C++ takes a second for a hundred of them. The argument list is not known: an entry passes its
    name and the addresses of its register and stack arguments (x86-64 calling convention), where
    npu_emulator_refuse_unknown looks for tensors.
    """
    lines = [
        "# Generated.",
        ".text",
        "refuse:",  # six register arguments, the return address, the stack arguments
        *(f"  push %{register}" for register in ("r9", "r8", "rcx", "rdx", "rsi", "rdi")),
        "  mov %rax, %rdi",
        "  mov %rsp, %rsi",
        "  lea 56(%rsp), %rdx",
        "  sub $8, %rsp",  # the stack is 16-byte aligned at a call
        "  call npu_emulator_refuse_unknown@PLT",
        "  add $56, %rsp",
        "  ret",
        ".macro unknown name",
        ".weak \\name\\()GetWorkspaceSize",
        ".type \\name\\()GetWorkspaceSize, @function",
        "\\name\\()GetWorkspaceSize:",
        "  lea 9f(%rip), %rax",
        "  jmp refuse",
        ".weak \\name",
        ".type \\name, @function",
        "\\name:",
        "  mov $161001, %eax",
        "  ret",
        ".pushsection .rodata",
        '9: .asciz "\\name"',
        ".popsection",
        ".endm",
        *(f"unknown {name}" for name in names),
        '.section .note.GNU-stack, "", @progbits',
    ]
    return "\n".join(lines) + "\n"


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EmulatorError(
            f"npu_bridge.emulator: compiling {what} failed (exit code {done.returncode}); the command was\n  "
            f"{' '.join(command)}\n{done.stderr[-4000:]}"
        )


class _Builder:
    def __init__(self, toolchain: Toolchain, work: Path, report):
        self.toolchain, self.work, self.report = toolchain, work, report
        npu, torch = toolchain.torch_npu / "include", toolchain.torch / "include"
        system = (
            npu / "third_party/acl/inc",
            npu / "third_party/hccl/inc",
            npu,
            torch,
            torch / "torch/csrc/api/include",
        )
        self.objects = work.parent / "objects"
        headers = [p for p in source_files() if p.suffix == ".h"]
        plain = [
            p for p in headers if p.relative_to(SOURCES).parts[0] != "opapi"
        ]  # no other folder includes opapi's headers
        self.bases = {
            header: _digest(_base(toolchain), *(p.read_bytes() for p in read))
            for header, read in ((RUNTIME, plain), (OPERATORS, headers))
        }
        self.objects.mkdir(exist_ok=True)
        # Private to this build unless kept: another build would remove it when it ends.
        place = self.objects if os.environ.get("NPU_EMULATOR_KEEP_HEADER") == "1" else work
        self.folders = {header: place / f"header.{base}" for header, base in self.bases.items()}
        self.includes = [f"-I{SOURCES}", f"-I{SOURCES / LIGHT}", *(f"-isystem{path}" for path in system)]

    def _command(self, header: str) -> list[str]:
        return [self.toolchain.compiler, *FLAGS, *LEVELS[header], *self.includes]

    def _compile(self, source: Path, target: Path, kept: Path, header: str, precompiled) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            if precompiled:
                precompiled.result()
            # g++ uses a precompiled header only if it is included first.
            first = ["-include", str(self.folders[header] / FIRST)] if precompiled else []
            _run([*self._command(header), *first, "-c", str(source), "-o", str(target)], source.name)
            _keep(target, kept)
        shutil.copyfile(kept, target)

    def _kept(self, source: Path, header: str) -> Path:
        base = self.bases[header] if source.suffix == ".cpp" else ""
        return self.objects / f"{source.stem}.{_digest(base, source.read_bytes())}.o"

    def build(self, workers: int) -> None:
        generated = self.work / "unknown.s"
        generated.write_text(unknown_source(operator_names(self.toolchain.torch_npu)))
        (self.work / "empty.cpp").write_text("// nothing of this library is ever called\n")
        objects: dict[str, list[Path]] = {}
        jobs: list[tuple[Path, Path, Path, str]] = []
        for library in LIBRARIES:
            sources = [p for folder in library.folders for p in sorted((SOURCES / folder).glob("*.cpp"))]
            if library.header == OPERATORS:
                sources.append(generated)
            objects[library.name] = [self.work / library.name / (p.stem + ".o") for p in sources]
            jobs += [
                (source, target, self._kept(source, library.header), library.header)
                for source, target in zip(sources, objects[library.name])
            ]
        # Operators last, the longest first: the other core compiles the rest while torch's headers are precompiled.
        jobs.sort(key=lambda job: (job[3] == OPERATORS, -job[0].stat().st_size))
        missing = {header for source, _, kept, header in jobs if source.suffix == ".cpp" and not kept.exists()}
        total, done = len(jobs), 0
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            # Headers are queued before all files, so no file waits for a header that was never started.
            headers = {
                header: pool.submit(self._precompile, header) for header in (OPERATORS, RUNTIME) if header in missing
            }
            files = [pool.submit(self._compile, *job, headers.get(job[3])) for job in jobs]
            for future in concurrent.futures.as_completed(files):
                try:
                    future.result()
                except EmulatorError:
                    pool.shutdown(cancel_futures=True)
                    raise
                done += 1
                self.report(done, total)
        for library in LIBRARIES:
            self._link(library.name, objects[library.name], library.links, library.header == OPERATORS)
        for name in EMPTY:
            self._link(name, [self.work / "empty.cpp"], (), False)
        for name, real in ALIASES.items():
            self._link(name, [self.work / "empty.cpp"], (real, "ascendcl"), False)

    def _precompile(self, header: str) -> None:
        first = self.folders[header] / FIRST
        kept = first.with_name(FIRST + ".gch")
        if kept.exists():
            return
        first.parent.mkdir(exist_ok=True)
        first.write_text(f'#include "{header}"\n')
        target = self.work / (Path(header).stem + ".gch")
        _run([*self._command(header), "-x", "c++-header", str(first), "-o", str(target)], header)
        _keep(target, kept)

    def _link(self, name: str, objects: list[Path], links: tuple[str, ...], torch: bool) -> None:
        lib = self.work / "lib"
        lib.mkdir(exist_ok=True)
        command = [
            self.toolchain.compiler,
            "-shared",
            "-fPIC",
            "-pthread",
            f"-Wl,-soname,lib{name}.so",
            "-Wl,-rpath,$ORIGIN",
            "-o",
            str(lib / f"lib{name}.so"),
        ]
        command += [str(o) for o in objects] + [f"-L{lib}", "-Wl,--no-as-needed", *(f"-l{link}" for link in links)]
        if torch:
            command += [f"-L{self.toolchain.torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([*command, "-lrt", "-ldl"], f"lib{name}.so")


def _reporter(quiet: bool):
    start = time.monotonic()

    def report(done: int, total: int) -> None:
        if quiet:
            return
        end = "\n" if done == total or not sys.stderr.isatty() else "\r"
        if sys.stderr.isatty() or done in (1, total) or done % 10 == 0:
            sys.stderr.write(
                f"npu_bridge.emulator: built {done} of {total} files, {time.monotonic() - start:.0f} s{end}"
            )
            sys.stderr.flush()

    return report


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the build lock: one process builds, the others wait and reuse the result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _require_own(folder: Path) -> None:
    """Refuse a folder of the cache that others may write: the libraries in it are loaded, and so run."""
    try:
        found = folder.stat()
    except OSError:
        return  # not made yet
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise EmulatorError(
            f"{folder} is not used as the emulator's cache: it belongs to another user, or others may write it; set "
            "XDG_CACHE_HOME to a folder of your own, or remove it"
        )


def build(toolchain: Toolchain | None = None, *, cache: Path | None = None, quiet: bool = False) -> Path:
    """Return the folder of the libraries, building them on first use.

    Raises:
      EmulatorError: the machine does not fit (see `environment.check`), another user could put libraries into the
        cache, or the compiler failed; the message holds its command and output.
    """
    toolchain = toolchain or check()
    base = cache or cache_folder()
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = base / key_of(toolchain)
    for place in (base, folder, folder / "lib"):
        _require_own(place)
    if (folder / "complete").exists():
        return folder / "lib"
    with _locked(folder.parent / f"{folder.name}.lock"):
        if (folder / "complete").exists():
            return folder / "lib"
        if not quiet:
            versions = ", ".join(f"{name} {version}" for name, version in toolchain.versions.items())
            sys.stderr.write(f"npu_bridge.emulator: first use with {versions}: compiling into {folder}\n")
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
        try:
            _Builder(toolchain, work, _reporter(quiet)).build(workers=min(os.cpu_count() or 1, 8))
            folder.mkdir(mode=0o700)
            (work / "lib").rename(folder / "lib")
            (folder / "lib").chmod(0o700)  # whatever the umask: `_require_own` looks at it the next time
            (folder / "complete").touch()
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder / "lib"
