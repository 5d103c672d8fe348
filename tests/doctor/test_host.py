"""Findings of the doctor on hosts made of files: driver, CANN, versions, failed imports."""

import dataclasses
import subprocess

import pytest

from npu_bridge.doctor import Host, Outcome, versions
from npu_bridge.doctor import host as hosts
from npu_bridge.doctor.findings import Finding

FITTING = {"torch": "2.13.0+cpu", "torch_npu": "2.13.0"}


@pytest.fixture
def host(tmp_path):
    """A host with driver, CANN 9.1.0 and its environment, all in order."""

    def put(path, text=""):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    for name in ("davinci0", "davinci1", "davinci_manager"):
        put(f"dev/{name}")
    put("usr/local/Ascend/driver/version.info", "Version=25.5.0\nascendhal_version=7.35.23\n")
    home = "usr/local/Ascend/cann"
    put(
        f"{home}/x86_64-linux/ascend_toolkit_install.info",
        "package_name=Ascend-cann-toolkit\nversion=9.1.0\narch=x86_64\n",
    )
    put(f"{home}/lib64/libascendcl.so")
    put(f"{home}/opp/built-in/op_impl/ai_core/tbe/kernel/ascend910b/kernel.o")
    environment = {"ASCEND_HOME_PATH": f"/{home}", "LD_LIBRARY_PATH": f"/{home}/lib64", "HOME": "/root"}
    made = Host(
        root=tmp_path,
        environment=environment,
        python=(3, 11),
        machine="x86_64",
        find=lambda name: None,
        installed=FITTING.get,
    )
    return lambda **changes: dataclasses.replace(made, **changes)


def by_check(findings):
    return {finding.check: finding for finding in findings}


def test_a_host_in_order_has_nothing_to_mend_but_the_pair_that_no_table_lists_yet(host):
    one = host()
    findings = [
        hosts.check_python(one),
        hosts.check_torch(one, "npu"),
        *hosts.check_driver(one),
        *hosts.check_cann(one),
    ]
    assert [finding.check for finding in findings if finding.outcome is not Outcome.OK] == ["CANN"]
    cann = by_check(findings)["CANN"]
    assert (
        cann.outcome is Outcome.UNSURE and "CANN 9.1.0" in cann.found and "does not list torch_npu 2.13.0" in cann.fix
    )
    assert (
        "version 25.5.0, 2 devices" in by_check(findings)["driver"].found
        and by_check(findings)["CANN kernels"].found == "ascend910b"
    )


def test_a_published_pair_is_in_order(host):
    (finding, *_) = hosts.check_cann(host(installed={"torch": "2.12.0", "torch_npu": "2.12.0"}.get))
    assert finding.outcome is Outcome.OK and "which torch_npu 2.12.0 was released with" in finding.found


@pytest.mark.parametrize(
    "installed, words",
    [
        ({}, ["torch is not installed", "pip install torch=="]),
        ({"torch": "2.13.0"}, ["torch_npu is not installed", "npu_bridge.emulator -- mindvl doctor"]),
        ({"torch": "2.13.0", "torch_npu": "2.12.0"}, ["torch 2.13.0, torch_npu 2.12.0", "pip install torch==2.12.0"]),
    ],
)
def test_missing_or_ill_matched_wheels_are_named_with_the_command_that_mends_them(host, installed, words):
    finding = hosts.check_torch(host(installed=installed.get), "npu")
    assert finding.outcome is Outcome.FAILED
    assert words[0] in finding.found and words[1] in finding.fix


def test_a_host_without_npu_and_cann_says_what_to_install(host, tmp_path):
    empty = host(root=tmp_path / "empty", environment={"HOME": "/root"})
    (driver,), (cann,) = hosts.check_driver(empty), hosts.check_cann(empty)
    assert driver.outcome is cann.outcome is Outcome.FAILED
    assert "/dev/davinci<N>" in driver.found and "npu-smi info" in driver.fix and "--device /dev/davinci0" in driver.fix
    assert "ASCEND_HOME_PATH is empty" in cann.found and "install CANN 9.1.0 or newer" in cann.fix


def test_cann_without_its_environment_names_the_script_to_source(host):
    (finding,) = hosts.check_cann(host(environment={"HOME": "/root"}))
    assert finding.outcome is Outcome.FAILED and "source /usr/local/Ascend/cann/set_env.sh" in finding.fix


def test_an_older_cann_than_torch_npu_was_released_with_is_refused(host, tmp_path):
    (tmp_path / "usr/local/Ascend/cann/x86_64-linux/ascend_toolkit_install.info").write_text("version=8.3.RC1\n")
    (finding, *_) = hosts.check_cann(host())
    assert finding.outcome is Outcome.FAILED and "CANN 8.3.RC1" in finding.found and "CANN 9.1.0" in finding.fix


def test_libraries_out_of_reach_and_missing_kernels_are_two_findings(host, tmp_path):
    (tmp_path / "usr/local/Ascend/cann/opp/built-in/op_impl/ai_core/tbe/kernel/ascend910b").rename(tmp_path / "moved")
    found = by_check(
        hosts.check_cann(
            host(environment={"ASCEND_HOME_PATH": "/usr/local/Ascend/cann", "LD_LIBRARY_PATH": "/elsewhere"})
        )
    )
    assert found["CANN libraries"].outcome is Outcome.FAILED and found["CANN kernels"].outcome is Outcome.UNSURE


def test_in_the_emulator_driver_and_cann_are_its_own(host):
    inside = host(environment={"NPU_EMULATOR_LIBRARIES": "/libraries"})
    assert all(
        (finding.outcome is Outcome.OK and "emulated" in finding.found) or "stands in" in finding.found
        for finding in (*hosts.check_driver(inside), *hosts.check_cann(inside))
    )


@pytest.mark.parametrize(
    "python, outcome", [((3, 11), Outcome.OK), ((3, 10), Outcome.FAILED), ((3, 15), Outcome.FAILED)]
)
def test_python_is_held_against_what_the_wheels_exist_for(host, python, outcome):
    assert hosts.check_python(host(python=python)).outcome is outcome


@pytest.mark.parametrize(
    "said, words",
    [
        ("ImportError: libhccl.so: cannot open shared object file: No such file or directory", "set_env.sh"),
        ("ImportError: libascend_hal.so: cannot open shared object file", "driver"),
        ("ImportError: x.so: undefined symbol: aclrtFoo", "compatibility table"),
        ("ModuleNotFoundError: No module named 'torch_npu'", "pip install torch=="),
        ("RuntimeError: Initialize:... NPU function error: aclrtSetDevice, error code is 507033", "group"),
        ("Segmentation fault", "run it by hand"),
    ],
)
def test_an_import_that_fails_is_explained_by_what_it_said(host, monkeypatch, said, words):
    monkeypatch.setattr(
        Host,
        "run",
        lambda self, command, timeout=30: subprocess.CompletedProcess(command, 1, "", f"Traceback\n{said}\n"),
    )
    finding, devices = hosts.probe(host(), "npu")
    assert devices == [] and finding.outcome is Outcome.FAILED
    assert said[:60] in finding.found and words in finding.fix, finding.fix


def test_candidates_of_cann_come_before_the_release():
    order = ["8.2.RC1", "8.3.RC1", "8.3.RC2", "8.3.0", "8.5.0", "9.1.0"]
    assert sorted(order, key=versions.cann_key) == order


@pytest.mark.parametrize(
    "torch_npu, wanted",
    [
        ("2.9.0", ("8.5.0", True)),
        ("2.9.0.post1", ("8.5.0", False)),
        ("2.14.0", ("9.1.0", False)),
        ("2.1.0", ("8.3.RC1", False)),
    ],
)
def test_the_cann_that_a_torch_npu_wants(torch_npu, wanted):
    assert versions.wanted_cann(torch_npu) == wanted


def test_a_failure_without_a_mend_is_a_mistake_of_the_check():
    with pytest.raises(ValueError, match="without a fix"):
        Finding("host", "driver", Outcome.FAILED, "broken")
