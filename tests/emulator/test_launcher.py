"""The emulator before anything is built: arguments, settings, refusals, cache key, form of the counters."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from npu_bridge.emulator import __main__ as launcher
from npu_bridge.emulator import build, environment
from npu_bridge.emulator.counters import Counts, counters
from npu_bridge.emulator.environment import Toolchain, check, find_cann, refuse_beside_cann
from npu_bridge.emulator.errors import EmulatorError, RealCannFound
from npu_bridge.emulator.settings import Settings, active, environment_for, parse_bytes


@pytest.mark.parametrize(
    "text, value", [("64GiB", 64 << 30), ("512MiB", 512 << 20), ("1.5GB", 1_500_000_000), ("100000000", 100_000_000)]
)
def test_an_amount_of_memory_is_a_number_and_a_unit(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["many", "64 gibibytes", "-1GiB", ""])
def test_what_is_no_amount_of_memory_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="such as 64GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(devices=0), "--devices 0"),
        (dict(soc="H100"), "known: Ascend910B1"),
        (dict(memory=1 << 20), "at least 64MiB"),
        (dict(transport="smoke"), "expected shm or tcp"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(EmulatorError, match=message):
        Settings(**settings)


def test_the_environment_of_a_process_holds_every_setting_and_the_libraries_first():
    made = environment_for(
        Settings(devices=4, execute=False, trace="x.json"),
        Path("libraries"),
        {"LD_LIBRARY_PATH": "others", "PATH": "p"},
    )
    assert (
        made["NPU_EMULATOR_DEVICES"] == "4"
        and made["NPU_EMULATOR_EXECUTE"] == "0"
        and Path(made["NPU_EMULATOR_TRACE"]).is_absolute()
    )
    assert made["LD_LIBRARY_PATH"].split(os.pathsep) == ["libraries", "others"] and made["PATH"] == "p"
    assert active(made) and not active({})


def fitting(**changes):
    return check(
        **{"find": lambda name: "/usr/bin/" + name, "machine": "x86_64", "python": environment.PYTHON, **changes}
    )


@pytest.fixture
def installed(monkeypatch):
    """Both wheels seem to be installed, in the versions given."""
    versions = dict(environment.VERSIONS)
    monkeypatch.setattr(environment, "installed_version", versions.get)
    monkeypatch.setattr(environment, "folder_of", lambda name: Path(name))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "g++ 12.2.0\n", ""))
    return versions


def test_a_machine_that_fits_gives_a_toolchain(installed):
    assert fitting().compiler_version == "g++ 12.2.0"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(find=lambda name: None), "no C\\+\\+ compiler: g\\+\\+ was not found.*apt-get install g\\+\\+"),
        (dict(machine="aarch64"), "the machine is aarch64"),
        (dict(python=(3, 12)), "Python is 3.12; the wheel that was tested is for 3.11"),
    ],
)
def test_a_machine_that_does_not_fit_is_refused_with_the_fix(installed, changes, message):
    with pytest.raises(EmulatorError, match=message):
        fitting(**changes)


@pytest.mark.parametrize(
    "name, version, message",
    [
        ("torch_npu", None, "torch_npu is not installed.*make setup-npu"),
        ("torch_npu", "2.12.0", "torch_npu is 2.12.0"),
        ("torch", "2.12.1+cpu", "torch is 2.12.1"),
    ],
)
def test_a_wheel_that_is_missing_or_of_another_version_is_refused(installed, name, version, message):
    installed[name] = version
    with pytest.raises(EmulatorError, match=message):
        fitting()


def test_all_problems_come_in_one_message(installed):
    installed["torch_npu"] = None
    with pytest.raises(EmulatorError, match="(?s)1\\. .*2\\. .*3\\. "):
        fitting(machine="aarch64", find=lambda name: None)


def test_a_real_cann_is_found_by_variable_by_folder_and_by_driver(tmp_path):
    assert find_cann({}, folders=(), device_node="missing") is None
    assert (
        find_cann({"ASCEND_HOME_PATH": "/opt/cann"}, folders=(), device_node="missing") == "ASCEND_HOME_PATH=/opt/cann"
    )
    assert find_cann({}, folders=(tmp_path,), device_node="missing") == tmp_path
    assert find_cann({}, folders=(), device_node=str(tmp_path)) == str(tmp_path)


def test_beside_a_real_cann_the_emulator_steps_aside_and_the_command_runs_plainly(monkeypatch, capfd):
    monkeypatch.setenv("ASCEND_HOME_PATH", "/opt/cann")
    with pytest.raises(RealCannFound, match="steps aside"):
        refuse_beside_cann()
    seen = {}
    monkeypatch.setattr(os, "execvpe", lambda file, command, env: seen.update(command=command, env=env))
    launcher.main(["--", "python", "-c", "pass"])
    assert seen["command"] == [sys.executable, "-c", "pass"] and not active(seen["env"])
    assert "running the command on the real CANN" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no command"),
        (["--", "no-such-program"], "not found on PATH"),
        (["--memory", "much", "--", "python"], "--memory 'much'"),
    ],
)
def test_the_launcher_refuses_what_it_cannot_run(arguments, message, capsys):
    with pytest.raises(SystemExit):
        launcher.main(arguments)
    assert message in capsys.readouterr().err


def test_options_of_the_command_are_the_commands():
    given = launcher.parser().parse_args(["--devices", "2", "--", "python", "x.py", "--devices", "7"])
    assert given.devices == 2 and given.command[-2:] == ["--devices", "7"]


def test_without_the_wheel_the_launcher_ends_with_the_reasons(monkeypatch, capsys):
    monkeypatch.setattr(environment, "installed_version", lambda name: None)
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    assert launcher.main(["--", "python", "-c", "pass"]) == 2
    assert "torch_npu is not installed" in capsys.readouterr().err


def test_the_cache_key_changes_with_compiler_versions_and_sources(tmp_path, monkeypatch):
    chain = Toolchain(Path("torch"), Path("torch_npu"), {"torch": "2.13.0"}, "g++", "g++ 12")
    keys = {build.key_of(chain), build.key_of(Toolchain(chain.torch, chain.torch_npu, chain.versions, "g++", "g++ 13")),
            build.key_of(Toolchain(chain.torch, chain.torch_npu, {"torch": "2.13.1"}, "g++", "g++ 12"))}  # fmt: skip
    assert len(keys) == 3 and build.key_of(chain) in keys
    (tmp_path / "a.cpp").write_text("int a;")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    first = build.key_of(chain)
    (tmp_path / "a.cpp").write_text("int b;")
    assert build.key_of(chain) != first


def test_a_build_that_is_complete_is_used_again(tmp_path):
    chain = Toolchain(Path("torch"), Path("torch_npu"), {}, "no compiler", "none")
    folder = tmp_path / build.key_of(chain)
    (folder / "lib").mkdir(parents=True)
    (folder / "complete").touch()
    assert build.build(chain, cache=tmp_path) == folder / "lib"


def test_a_compiler_that_fails_is_named_with_its_command_and_words(tmp_path):
    (tmp_path / "torch_npu" / "lib").mkdir(parents=True)
    (tmp_path / "torch_npu" / "lib" / "libtorch_npu.so").write_bytes(b"\0aclnnAddGetWorkspaceSize\0")
    chain = Toolchain(tmp_path / "torch", tmp_path / "torch_npu", {}, "false", "none")
    with pytest.raises(EmulatorError, match="failed \\(exit code 1\\); the command was\n  false -std=c"):
        build.build(chain, cache=tmp_path / "cache", quiet=True)
    assert not list((tmp_path / "cache").glob("*/complete")), "half a build must not pass for a whole one"


def test_a_changed_source_costs_its_own_compilation_and_a_changed_header_its_readers(tmp_path, monkeypatch):
    """With a compiler that only writes down what it was asked."""
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\necho "$@" >> '
        + str(log)
        + '\nfor word; do [ "$last" = -o ] && echo built > "$word"; last=$word; done\n'
    )
    compiler.chmod(0o755)
    sources = tmp_path / "src"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    (tmp_path / "torch_npu" / "lib").mkdir(parents=True)
    (tmp_path / "torch_npu" / "lib" / "libtorch_npu.so").write_bytes(b"\0aclnnAddGetWorkspaceSize\0")
    chain = Toolchain(tmp_path / "torch", tmp_path / "torch_npu", {}, str(compiler), "none")

    def compiled():
        log.unlink(missing_ok=True)
        build.build(chain, cache=tmp_path / "cache", quiet=True)
        words = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return sorted(Path(line[line.index("-c") + 1]).name for line in words if "-c" in line)

    everything = compiled()
    assert len(everything) > 25 and compiled() == [], "a finished build is used again"
    (sources / "opapi" / "rotary.cpp").write_text((sources / "opapi" / "rotary.cpp").read_text() + "// changed\n")
    assert compiled() == ["rotary.cpp"]
    (sources / "opapi" / "operator.h").write_text((sources / "opapi" / "operator.h").read_text() + "// changed\n")
    readers = {path.name for path in (sources / "opapi").glob("*.cpp")}
    assert set(compiled()) == readers and readers < set(everything)


def test_every_operator_of_the_wheel_gets_an_entry_that_refuses(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_npu.so").write_bytes(
        b"\0aclnnAddGetWorkspaceSize\0other\0aclRfft1DGetWorkspaceSize\0xaclnnNotGetWorkspaceSize\0"
    )
    names = build.operator_names(tmp_path)
    assert names == ["aclRfft1D", "aclnnAdd"]
    lines = build.unknown_source(names).splitlines()
    assert "unknown aclnnAdd" in lines and "unknown aclRfft1D" in lines


def test_every_source_is_in_a_library_and_none_is_long():
    folders = {folder for library in build.LIBRARIES for folder in library.folders}
    for path in build.source_files():
        assert path.relative_to(build.SOURCES).parts[0] in folders, path
        assert len(path.read_text().splitlines()) <= 800, path


def entry(calls=0, captured=0, replayed=0, size=0):
    return {
        "calls": calls,
        "captured": captured,
        "replayed": replayed,
        "bytes": size,
        "host_us": 1.0,
        "compute_us": 2.0,
    }


def test_counts_tell_what_ran_and_lay_it_out_as_a_table(tmp_path):
    kinds = {kind: {} for kind in ("kernels", "copies", "synchronisations", "collectives", "graphs", "allocations")}
    kinds["kernels"] = {"aclnnAdd": entry(calls=3, captured=2, replayed=10), "aclnnMul": entry(calls=1, captured=1)}
    kinds["graphs"] = {"capture": entry(calls=1), "replay": entry(calls=5)}
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(kinds | {"memory": [{"limit": 100, "used": 10, "peak": 40}]}))
    counts = Counts.read(path)
    assert counts.kernels == {"aclnnAdd": 11}, "three calls, two of them only recorded, and ten in replays"
    assert counts.replays == 5 and counts.peak_bytes == 40
    lines = counts.table().splitlines()
    assert lines[1].split()[:4] == ["kernels", "aclnnAdd", "3", "10"] and "40 at most, of 100" in lines[-1]


def test_counters_outside_the_emulator_are_refused(monkeypatch):
    monkeypatch.delenv("NPU_EMULATOR_LIBRARIES", raising=False)
    with pytest.raises(EmulatorError, match="python -m npu_bridge.emulator"):
        counters()


def test_the_page_of_conformance_shows_figures_failures_and_what_they_prove(tmp_path):
    from npu_bridge.emulator.conformance import page, read

    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.emulator.device.test_kernels" name="test_a[x|y]" '
        'time="1.5"><properties><property name="error" value="1e-7"/>'
        '</properties></testcase><testcase classname="tests.emulator.device.test_runtime" name="test_b" '
        'time="2"><failure message="AssertionError: 3 != 4&#10;more"/></testcase>'
        "</testsuite></testsuites>"
    )
    text = page(read(report), "torch 2.13.0", "x86_64", "2026-11-22", 4.0, 12.0)
    assert "**1 passed, 1 failed, 0 skipped in 4 s.**" in text and "It does not prove how CANN's kernels round" in text
    assert "| a[x\\|y] | passed | error 1e-7 |" in text and "| b | failed | AssertionError: 3 != 4 |" in text


def test_conformance_asks_for_a_report_that_may_hold_figures(tmp_path, monkeypatch):
    """A case with a figure, through pytest itself: no warning, and the figure is read back."""
    from npu_bridge.emulator import conformance

    (tmp_path / "test_figure.py").write_text(
        "def test_a_figure(record_property):\n    record_property('error', '1e-7')\n"
    )
    seen = {}

    def run(command, cwd, env):
        seen["report"] = command[command.index("-o") : command.index("-o") + 3]
        plain = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-W",
            "error",
            *seen["report"],
            str(tmp_path / "test_figure.py"),
        ]
        done = subprocess_run(plain, cwd=tmp_path, capture_output=True, text=True)
        seen["cases"] = conformance.read(Path(seen["report"][2].partition("=")[2]))
        return done

    subprocess_run = subprocess.run
    monkeypatch.setattr(
        conformance, "check", lambda: Toolchain(Path("torch"), Path("torch_npu"), {"torch": "2.13.0"}, "g++", "g++ 12")
    )
    monkeypatch.setattr(conformance, "build", lambda toolchain: None)
    monkeypatch.setattr(conformance.subprocess, "run", run)
    assert conformance.main(["-k", "a selection writes no page"]) == 0
    assert [case["found"] for case in seen["cases"]] == [{"error": "1e-7"}]
