"""Protection against other users of the machine, hostile names and hostile answers."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import re
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from mindvl_jax import cli
from mindvl_jax.cli.evaluate import merge
from mindvl_jax.cli.main import main
from mindvl_jax.core import compiled, files
from mindvl_jax.core.errors import for_terminal, printable
from mindvl_jax.training.loggers import write_csv
from npu_bridge.runtime import cache

ROOT = Path(cli.__file__).parents[2]
SOURCES = sorted([*(ROOT / "mindvl_jax").rglob("*.py"), *(ROOT / "npu_bridge").rglob("*.py"), ROOT / "train.py"])
MODES = {"others may write": 0o777, "the group may write": 0o770, "sticky and open": 0o1777}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_compiled_programs_are_not_read_from_a_folder_that_others_may_write(monkeypatch, tmp_path, capsys, mode):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    compiled.cache_folder().mkdir(parents=True)
    compiled.cache_folder().chmod(mode)
    compiled.share_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ and "not used" in capsys.readouterr().err
    compiled.cache_folder().chmod(0o700)
    compiled.share_compiled_programs()
    assert os.environ.pop("JAX_COMPILATION_CACHE_DIR") == str(compiled.cache_folder())


def test_a_cache_that_is_made_is_the_users_alone(tmp_path):
    assert files.private_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) & 0o077 == 0
    (tmp_path / "file").write_text("")
    assert not files.private_folder(tmp_path / "file" / "x")


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_bridge_runs_no_program_from_a_folder_that_others_may_write(monkeypatch, tmp_path, mode):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "x.json").write_text(json.dumps({"source": {"text": "raise SystemExit"}, "constant_dtypes": []}))
    folder.chmod(mode)
    monkeypatch.setenv("NPU_BRIDGE_CACHE", str(folder))
    cache._private.cache_clear()
    with pytest.warns(UserWarning, match="is not used"):
        assert cache.load("x") is None
    assert sorted(path.name for path in folder.iterdir()) == ["x.json"]


@pytest.mark.parametrize(
    "meta",
    ["", "[]", "5", "{", "null", "[" * 50_000, '{"constant_dtypes": 5}', '{"constant_dtypes": [], "source": []}'],
)
@pytest.mark.parametrize("arrays", [b"", b"PK\x03\x04cut", b"\x80\x04cos\nsystem\n(S'exit 1'\ntR."])
def test_a_damaged_cache_entry_counts_as_none(monkeypatch, tmp_path, meta, arrays):
    monkeypatch.setenv("NPU_BRIDGE_CACHE", str(tmp_path))
    tmp_path.chmod(0o700)
    cache._private.cache_clear()
    (tmp_path / "x.json").write_text(meta)
    (tmp_path / "x.npz").write_bytes(arrays)
    assert cache.load("x") is None


def test_a_cache_entry_that_holds_a_pickle_is_not_unpickled(monkeypatch, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    monkeypatch.setenv("NPU_BRIDGE_CACHE", str(tmp_path))
    tmp_path.chmod(0o700)
    cache._private.cache_clear()
    np.savez(tmp_path / "x.npz", c0=np.array([Evil()], dtype=object))
    (tmp_path / "x.json").write_text(json.dumps({"constant_dtypes": ["float32"], "source": {}}))
    assert cache.load("x") is None and not (tmp_path / "ran").exists()


# --- the sources themselves ------------------------------------------------------------------------------------------

DANGEROUS = {"eval", "exec"}
"""Files that make code at run time: the bridge's own programs."""
MAKES_CODE = {"npu_bridge/runtime/scopes.py", "npu_bridge/runtime/program.py", "npu_bridge/compiler/exchange_order.py"}


def calls():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path.relative_to(ROOT).as_posix(), node, ast.unparse(node.func)


def test_no_source_uses_a_reader_that_can_run_code():
    wrong = []
    for path, node, name in calls():
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in DANGEROUS and path not in MAKES_CODE and not path.startswith("npu_bridge/emulator"):
            wrong.append((path, node.lineno, name))
        if name in ("pickle.load", "pickle.loads", "joblib.load", "np.load") and options.get("allow_pickle") == "True":
            wrong.append((path, node.lineno, name))
        if name in ("pickle.load", "pickle.loads", "os.system", "os.popen", "tempfile.mktemp", "yaml.unsafe_load"):
            wrong.append((path, node.lineno, name))
        if name == "torch.load" and options.get("weights_only") != "True":
            wrong.append((path, node.lineno, name))
        if options.get("shell") == "True" or options.get("trust_remote_code") == "True":
            wrong.append((path, node.lineno, name))
    assert not wrong, wrong


def test_no_source_names_a_file_in_the_shared_temporary_folder():
    """Such a name can be taken by another user first; `tempfile` makes names that cannot be guessed."""
    wrong = []
    for path in SOURCES:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if re.search(r"[\"'](/var)?/tmp/", line) or "gettempdir()" in line:
                wrong.append((path.relative_to(ROOT).as_posix(), number))
    assert not wrong, wrong


def test_what_listens_listens_on_this_machine_alone_unless_told():
    wrong = [
        (path, node.lineno)
        for path, node, name in calls()
        if name.endswith(".bind") and node.args and "0.0.0.0" in ast.unparse(node.args[0])
    ]
    from mindvl_jax.cli import serve

    parser = __import__("argparse").ArgumentParser()
    serve.add_arguments(parser)
    assert not wrong and parser.parse_args(["--weights", "x"]).host == "127.0.0.1"


# --- terminals and spreadsheets --------------------------------------------------------------------------------------

FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "=cmd|' /C calc'!A0", "\t=1", "\r=1", '=HYPERLINK("http://x")']


@pytest.mark.parametrize("text", FORMULAS)
def test_a_cell_that_looks_like_a_formula_is_text(text):
    out = io.StringIO()
    write_csv([{"phase": text, text: 1, "ids": [text], "loss": -1.5}], out)
    rows = list(csv.reader(io.StringIO(out.getvalue())))
    cells = {cell for row in rows for cell in row}
    assert not any(cell.startswith(("=", "+", "@", "\t", "\r")) for cell in cells)
    assert "-1.5" in cells and not any(cell.startswith("-") for cell in cells - {"-1.5"})


ESCAPES = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\x9b31m",
    "\x1b]8;;http://x\x1b\\",
    "\x08\x08",
    "\r over",
    "\x00",
    "\x7f",
    "\x1bP1$r",
    "\x85",
]


@pytest.mark.parametrize("text", ESCAPES)
def test_an_answer_does_not_steer_the_terminal_and_reaches_a_pipe_unchanged(monkeypatch, text):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", for_terminal(f"a{text}b"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert for_terminal(text) == text and printable("a\n\tb") == "a\n\tb"


# --- files of results that are damaged -------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff\xfe\x00", b"[" * 50_000])
def test_damaged_results_are_set_aside_and_new_ones_are_kept(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    assert merge(path, {"a": {"weights": "w"}}, "w") == ({"a": {"weights": "w"}}, [])
    assert (tmp_path / "results.json.damaged").read_bytes() == content and not path.exists()


@pytest.mark.parametrize("content", [b"{\n", b"[]\n", b"\xff\n", b"[" * 50_000 + b"\n", b'"x"\n'])
def test_damaged_lines_of_metrics_are_left_out_of_the_table(tmp_path, capsys, content):
    (tmp_path / "metrics.jsonl").write_bytes(content + b'{"step": 1, "phase": "=1"}\n')
    assert main(["metrics", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == ["step,phase", "1,'=1"]
