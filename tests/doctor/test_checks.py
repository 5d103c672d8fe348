"""Operators, collectives and the golden training on the CPU, and the command that shows them."""

import json
import sys
import textwrap

import pytest

from mindvl_jax.cli import doctor as command
from mindvl_jax.cli.main import main
from mindvl_jax.golden import steps as golden
from npu_bridge.doctor import Host, Outcome, collectives, operators, training
from npu_bridge.doctor.training import Golden


def test_operators_are_measured_in_both_dtypes_and_unknown_ones_refused():
    (finding,) = operators.check(Host(), "cpu", ["swiglu"])
    assert finding.outcome is Outcome.OK and "float32 " in finding.found and "bfloat16 " in finding.found, finding
    with pytest.raises(KeyError, match="no operator swiglo; there are adamw"):
        list(operators.check(Host(), "cpu", ["swiglo"]))


def test_an_operator_that_is_off_or_raises_says_how_to_do_without_its_fused_call():
    off = operators.finding({"operator": "rms_norm", "errors": {"float32": 1e-2, "bfloat16": 1e-3}})
    assert (
        off.outcome is Outcome.FAILED
        and "float32 1.0e-02, allowed 5.0e-06" in off.found
        and "NPU_BRIDGE_EQUIVALENT=norm" in off.fix.replace("rms_norm", "norm")
    )
    raised = operators.finding({"operator": "gelu", "errors": {"float32": "RuntimeError: EZ9999", "bfloat16": 1e-4}})
    assert raised.outcome is Outcome.FAILED and "EZ9999" in raised.found
    assert (
        operators.finding({"operator": "gelu", "errors": {"float32": float("nan"), "bfloat16": 0.0}}).outcome
        is Outcome.FAILED
    )


def test_an_operator_that_takes_its_process_with_it_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    stub = tmp_path / "stub"
    stub.write_text(
        textwrap.dedent(f"""\
        #!{sys.executable}
        import json, os, sys
        for name in sys.argv[sys.argv.index("--device") + 2 :]:
            print(json.dumps({{"operator": name}}), flush=True)
            if name == "rms_norm":
                sys.stderr.write("aicore exception\\n")
                sys.stderr.flush()
                os._exit(139)
            print(json.dumps({{"operator": name, "errors": {{"float32": 0.0, "bfloat16": 0.0}}}}), flush=True)
        """)
    )
    stub.chmod(0o755)
    monkeypatch.setattr(operators.sys, "executable", str(stub))
    findings = {finding.check: finding for finding in operators.check(Host(), "npu", ["gelu", "rms_norm", "swiglu"])}
    assert [findings[name].outcome for name in ("gelu", "rms_norm", "swiglu")] == [
        Outcome.OK,
        Outcome.FAILED,
        Outcome.OK,
    ]
    assert "aicore exception" in findings["rms_norm"].found and "NPU_BRIDGE_EQUIVALENT" in findings["rms_norm"].fix


def test_collectives_over_two_processes_agree_with_their_formulas():
    findings = list(collectives.check(Host(), "cpu", 2))
    assert len(findings) == 8 and all(finding.outcome is Outcome.OK for finding in findings), findings
    assert next(collectives.check(Host(), "cpu", 1)).outcome is Outcome.LEFT_OUT


def stored():
    return json.loads(golden.STORED.read_text())


def test_the_golden_batches_are_those_that_the_losses_were_stored_with():
    config = golden.configuration(compute_dtype="float32", device=None)
    _shape, made = golden.batches(config.model)
    assert golden.digest(made) == stored()["batches"]
    assert all((batch.loss_weights.sum(axis=1) > 0).all() for batch in made)
    assert min(batch.visual_index.max() for batch in made) >= 0  # every batch has images


def test_the_stored_losses_fall_and_bfloat16_is_near_float32():
    losses = stored()["losses"]
    assert all(len(run) == golden.STEPS and run[-1] < 0.7 * run[0] for run in losses.values()), losses
    assert 0 < max(abs(a - b) / b for a, b in zip(losses["bfloat16"], losses["float32"])) < 0.05


def test_the_golden_training_through_the_bridge_on_the_cpu_has_the_stored_losses():
    losses, _ = golden.train(golden.configuration(compute_dtype="float32", device="cpu"))
    finding = training.compare(Golden("float32", ["train"], stored()["losses"]["float32"], command.FLOAT32), losses)
    assert finding.outcome is Outcome.OK, finding


@pytest.mark.parametrize("step, words", [(0, "the first loss differs already"), (7, "the first loss agrees")])
def test_a_loss_that_differs_points_at_the_pass_that_made_it(step, words):
    wanted = [3.0 - 0.1 * n for n in range(10)]
    got = [loss * (1 + 1e-3 * (n >= step)) for n, loss in enumerate(wanted)]
    finding = training.compare(Golden("g", ["train"], wanted, 1e-4), got)
    assert finding.outcome is Outcome.FAILED and words in finding.fix
    assert training.compare(Golden("g", ["train"], wanted, 1e-4), [float("nan")] * 10).outcome is Outcome.FAILED
    assert training.compare(Golden("g", ["train"], wanted, 1e-4), wanted[:5]).outcome is Outcome.FAILED


def test_a_training_that_ends_badly_shows_its_last_word():
    finding = training.check(
        Host(), Golden("g", [sys.executable, "-c", "raise SystemExit('out of memory')"], [1.0], 1e-4)
    )
    assert finding.outcome is Outcome.FAILED and "out of memory" in finding.found


def test_the_command_writes_json_and_ends_with_0_when_nothing_failed(capsys):
    code = main(["doctor", "--device", "cpu", "--only", "network", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (
        code == 0
        and told["device"] == "cpu"
        and {finding["group"] for finding in told["findings"]} == {"host", "network"}
    )


def test_without_torch_npu_the_command_says_what_is_missing_and_ends_with_1(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code = main(["doctor"])
    text = capsys.readouterr().out
    assert code == 1
    for words in (
        "torch_npu is not installed",
        "no NPU is visible",
        "not installed: ASCEND_HOME_PATH is empty",
        "no npu can be used",
        "what to do",
        "pip install torch==",
    ):
        assert words in text, text


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--devices", "0"], "expected at least 1"),
        (["--device", "cpu", "--only", "operators", "--operators", "swiglo"], "no operator swiglo"),
    ],
)
def test_wrong_arguments_are_refused_with_what_there_is(arguments, words, capsys):
    assert main(["doctor", *arguments]) == 2
    assert words in capsys.readouterr().err
