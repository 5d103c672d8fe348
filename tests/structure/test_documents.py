"""Check that documents name files, names and pages that exist, so that a moved module takes its mentions along."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# Paths that only exist once a command has run, and files of other projects.
MADE = re.compile(r"^(benchmarks/results/|docs/jax_tests.md$)")
HISTORY = {"CHANGELOG.md"}


@functools.cache
def source_files() -> tuple[str, ...]:
    folders = ("mindvl_jax", "npu_bridge", "examples", "tests", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    return tuple("/" + path.relative_to(ROOT).as_posix() for path in [*files, ROOT / "train.py"])


def paths_in(text: str) -> set[str]:
    """Paths in backquotes that start with one of our folders, without arguments, members and globs."""
    quoted = re.findall(r"`([^`\n]+)`", text)
    folders = r"(?:mindvl_jax|npu_bridge|examples|tests|configs|benchmarks|docs|requirements)"
    return {token for token in quoted if re.fullmatch(folders + r"(?:/[\w.-]+)+/?", token)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_and_links_of_a_document_exist(document):
    text = document.read_text(encoding="utf-8")
    missing = set()
    if document.name not in HISTORY:
        missing = {path for path in paths_in(text) if not MADE.match(path) and not (ROOT / path).exists()}
        modules = re.findall(
            r"`((?:\w+/)*\w+\.(?:py|cpp|h))`", text
        )  # `passes/loop_invariants.py`: the end of some path
        missing |= {name for name in modules if not any(path.endswith("/" + name) for path in source_files())}
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in link and not link.startswith("mailto:") and not (document.parent / link).exists():
            missing.add(link)
    assert not missing, f"{document.name} names what is not there: {sorted(missing)}"


def test_the_navigation_and_the_reference_name_what_exists():
    pages = re.findall(r":\s+([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    unlisted = {path.name for path in (ROOT / "docs").glob("*.md")} - set(pages)
    assert pages and not unlisted, f"add these pages to the navigation of mkdocs.yml: {sorted(unlisted)}"
    assert not [page for page in pages if not (ROOT / "docs" / page).is_file()]
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert names and not [name for name in names if not defined(name)], [name for name in names if not defined(name)]


def defined(name: str) -> bool:
    """Whether a dotted name is a module, or a class or function on top of one."""
    path = ROOT / name.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    module = path.parent.with_suffix(".py")
    if not module.is_file():
        return False
    nodes = ast.parse(module.read_text(encoding="utf-8")).body
    return path.name in {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
