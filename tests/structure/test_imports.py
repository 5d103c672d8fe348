"""Check the direction of imports: rooms only import from rooms below them, inside functions too, and modules form no
cycle.

Every import statement is read with `ast`, so nothing is executed and an import inside a function counts like one on
top. Nothing is excepted.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Floors from bottom to top. Rooms of one floor do not import each other.
MINDVL_FLOORS = (
    ("core",), ("config",), ("parallel",), ("data",), ("models",), ("objectives",), ("checkpoints",), ("weights",),
    ("training", "inference"), ("evaluation",), ("parity", "planning", "profiling", "golden"), ("cli",),
)  # fmt: skip
BRIDGE_FLOORS = (
    ("errors", "sharding_rule"),
    ("jaxcompat",),
    ("ops",),
    ("kernels", "compiler"),
    ("runtime",),
    ("emulator",),
    ("doctor", "launch"),
)
# Only these may import `examples`, the quickstart's demonstration: themselves, the tests, the benchmarks and train.py.
USERS_OF_EXAMPLES = ("examples", "benchmarks")
# Packages that an installation may lack. They are imported by the modules that need them, and those inside functions.
OPTIONAL = {"torch", "torch_npu", "transformers", "lmms_eval", "easy_vqa", "resvg_py"}
# Packages that take a second to import, so that a module without them may put them off.
SLOW = {"jax", "flax", "pyarrow", "matplotlib"}
# Rooms whose modules import no such package, not even inside functions.
NEVER = {
    "mindvl_jax.core": {"torch"}, "mindvl_jax.config": {"torch", "jax", "flax"}, "mindvl_jax.parallel": {"torch"},
    "mindvl_jax.data": {"torch", "jax", "flax"}, "mindvl_jax.models": {"torch", "transformers"},
    "mindvl_jax.objectives": {"torch"},
    "npu_bridge.ops": {"torch"}, "npu_bridge.emulator": {"jax"},
    }  # fmt: skip

# Modules that rename files for another reason than an atomic write.
ATOMIC_BY_HAND = ("mindvl_jax.training.resume",)  # moves damaged checkpoint folders aside


@dataclass(frozen=True)
class Import:
    """One import of `target` by `source`, both dotted names; `late` inside a function."""

    source: str
    target: str
    late: bool


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    folders = ("mindvl_jax", "npu_bridge", "examples", "benchmarks")
    return {name_of(path): path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))}


def imports_of(source: str, text: str, known: dict[str, Path] | None = None) -> Iterator[Import]:
    """Yield every import of a module's text. `from a import b` means `a.b` where that is a module, else `a`."""
    known = modules() if known is None else known

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(source, alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = source.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            targets = {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
            yield from (Import(source, target, late) for target in sorted(targets))
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, late)

    yield from visit(ast.parse(text), False)


@cache
def all_imports() -> tuple[Import, ...]:
    return tuple(
        each for name, path in modules().items() for each in imports_of(name, path.read_text(encoding="utf-8"))
    )


def floor(name: str) -> tuple[int, str] | None:
    """The floor's number and the room of a module, or None for the packages' own `__init__` and modules outside the
    floors.
    """
    package, _, rest = name.partition(".")
    floors = {"mindvl_jax": MINDVL_FLOORS, "npu_bridge": BRIDGE_FLOORS}.get(package, ())
    room = rest.split(".")[0]
    return next(((number, room) for number, rooms in enumerate(floors) if room in rooms), None)


def points_down(source: str, target: str) -> bool:
    here, there = floor(source), floor(target)
    if source.split(".")[0] != target.split(".")[0] or here is None or there is None:
        return True
    return here[1] == there[1] or there[0] < here[0]


def cycles(edges: set[tuple[str, str]]) -> set[tuple[str, ...]]:
    """Return the groups of modules that reach each other (strongly connected components of two or more; Tarjan)."""
    following: dict[str, list[str]] = {}
    for source, target in sorted(edges):
        if source != target:
            following.setdefault(source, []).append(target)
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: set[tuple[str, ...]] = set()

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        stack.append(name)
        for target in following.get(name, ()):
            if target not in number:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], number[target])
        if lowest[name] == number[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.add(tuple(sorted(group)))

    for name in list(following):
        if name not in number:
            visit(name)
    return found


@cache
def heavy_packages(name: str) -> frozenset[str]:
    """Optional and slow packages that importing this module imports, itself or by what it imports on top level."""
    seen, waiting, found = {name}, [name], set()
    top = {}
    for each in all_imports():
        if not each.late:
            top.setdefault(each.source, []).append(each.target)
    while waiting:
        for target in top.get(waiting.pop(), ()):
            found |= {target.split(".")[0]} & (OPTIONAL | SLOW)
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return frozenset(found)


def require_none(found: set, what: str) -> None:
    assert not found, f"{what}:\n" + "\n".join(map(str, sorted(found)))


def test_every_room_has_a_floor():
    rooms = {name.split(".")[1] for name in modules() if name.startswith("mindvl_jax.")}
    unknown = rooms - {room for rooms in MINDVL_FLOORS for room in rooms}
    assert not unknown, f"name the floor of these rooms in MINDVL_FLOORS and docs/architecture.md: {sorted(unknown)}"


def test_imports_point_down():
    found = {
        (each.source, each.target)
        for each in all_imports()
        if each.target in modules() and not points_down(each.source, each.target)
    }
    require_none(found, "these imports point upwards or sideways; move the code down or pass it in as an argument")


def test_modules_form_no_cycle():
    found = cycles({(each.source, each.target) for each in all_imports() if each.target in modules()})
    require_none(found, "these modules import each other; move what they share into a third one below")


def test_the_bridge_knows_nothing_of_mindvl():
    found = {
        each
        for each in all_imports()
        if each.source.startswith("npu_bridge") and each.target.split(".")[0] in ("mindvl_jax", "examples")
    }
    assert not found, found


def test_the_packages_import_no_examples():
    found = {
        (each.source, each.target)
        for each in all_imports()
        if each.target.split(".")[0] in ("examples", "benchmarks")
        and each.source.split(".")[0] not in USERS_OF_EXAMPLES
    }
    require_none(found, "examples/ is no part of the library; pass the function in from train.py")


def test_rooms_import_none_of_the_packages_they_must_not_know():
    found = {
        (each.source, each.target)
        for each in all_imports()
        for room, packages in NEVER.items()
        if not each.source.endswith(
            "reference"
        )  # a family's reference for comparisons is made of transformers' classes
        and (each.source + ".").startswith(room + ".")
        and each.target.split(".")[0] in packages
    }
    assert not found, sorted(found)


def test_imports_inside_functions_have_an_optional_or_slow_package_as_their_reason():
    """Commands may import late, so that `--help` stays fast.

    Elsewhere a late import of our own is a hidden cycle or a habit.
    """
    found = {
        each.source
        for each in all_imports()
        if each.late
        and each.target in modules()
        and not each.source.startswith(("mindvl_jax.cli", "benchmarks"))
        and not heavy_packages(each.target) - heavy_packages(each.source)
    }
    require_none(
        found,
        "these modules import our own code inside a function, and no optional or slow package is the reason",
    )


def test_files_are_replaced_in_one_place():
    """`core.files.replacing` is the one atomic write; a rename by hand forgets the mode, the clean-up or a second
    writer.
    """
    renames = {"os.replace", "os.rename", "shutil.move", "tempfile.mkstemp"}
    found = {
        (name, ast.unparse(node.func))
        for name, path in modules().items()
        if name.startswith(("mindvl_jax.", "examples.")) and name not in ("mindvl_jax.core.files", *ATOMIC_BY_HAND)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in renames
    }
    assert not found, f"use mindvl_jax.core.files.replacing: {sorted(found)}"


def test_the_check_sees_imports_inside_functions_and_cycles_of_three():
    known = dict.fromkeys(("a", "a.b", "a.c"), ROOT)
    text = "import a\ndef f():\n    from a import b, x\n    class C:\n        import a.c\n"
    seen = {(each.target, each.late) for each in imports_of("z", text, known)}
    assert seen == {("a", False), ("a.b", True), ("a", True), ("a.c", True)}
    assert cycles({("x", "y"), ("y", "z"), ("z", "x"), ("z", "w"), ("w", "w")}) == {("x", "y", "z")}
    assert not points_down("mindvl_jax.training.trainer", "mindvl_jax.evaluation.report")
    assert not points_down("mindvl_jax.training.trainer", "mindvl_jax.inference.engine")
    assert points_down("mindvl_jax.cli.plan", "mindvl_jax.core.files")
