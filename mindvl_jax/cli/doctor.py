"""`mindvl doctor`: check host, network, operators, collectives and a short training; name the fix of each failure."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence

from mindvl_jax.cli import common
from mindvl_jax.core.errors import UserError, at_least_one
from npu_bridge.doctor import Finding, Host, Outcome

GROUPS = ("host", "network", "operators", "collectives", "training")
# float32: other kernels add in another order, which moves the losses of these steps by some 1e-6 (docs/conformance.md);
# what is wrong moves them by more than 1e-3.
FLOAT32 = 1e-4
STYLES = {Outcome.OK: "green", Outcome.UNSURE: "yellow", Outcome.FAILED: "bold red", Outcome.LEFT_OUT: "dim"}


EPILOG = common.examples("mindvl doctor --device npu", "mindvl doctor --device cpu --only host operators --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("npu", "cuda", "cpu"),
        default="npu",
        help="what the bridge shall run on (default %(default)s)",
    )
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="devices of the collectives and of the training over several; default: all that are visible (cpu: 2 "
        "processes)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=GROUPS,
        metavar="GROUP",
        help=f"some of {', '.join(GROUPS)}; host is always looked at",
    )
    parser.add_argument(
        "--operators", nargs="+", metavar="NAME", help="some operators of npu_bridge.kernels; default: all"
    )
    parser.add_argument("--json", action="store_true", help="write the findings as JSON")


def run(args: argparse.Namespace) -> int:
    at_least_one(args, "devices")
    findings = []
    show = None if args.json else _Display()
    # torch_npu prints some of its warnings to standard output, where only the JSON may be.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        for finding in examine(
            Host(), args.device, groups=args.only or GROUPS, count=args.devices, operators=args.operators
        ):
            findings.append(finding)
            if show:
                show.line(finding)
    if args.json:
        json.dump(
            {
                "device": args.device,
                "outcome": verdict(findings).value,
                "findings": [finding.as_dict() for finding in findings],
            },
            sys.stdout,
            indent=2,
        )
        print()
    else:
        show.end(findings)
    return 1 if verdict(findings) is Outcome.FAILED else 0


def verdict(findings: Sequence[Finding]) -> Outcome:
    """Failed when anything failed, else unsure when anything is unsure."""
    outcomes = {finding.outcome for finding in findings}
    return next((outcome for outcome in (Outcome.FAILED, Outcome.UNSURE) if outcome in outcomes), Outcome.OK)


def examine(
    host: Host,
    kind: str,
    *,
    groups: Sequence[str] = GROUPS,
    count: int | None = None,
    operators: Sequence[str] | None = None,
) -> Iterator[Finding]:
    """Findings as they come. What cannot be checked because the device cannot be used is left out by name.

    Raises:
      UserError: more devices than there are, or an operator that does not exist.
    """
    from npu_bridge.doctor import collectives, network, training
    from npu_bridge.doctor import host as hosts
    from npu_bridge.doctor import operators as kernels

    found, devices = hosts.check(host, kind)
    yield from found
    available = 2 if kind == "cpu" and count is None else len(devices) if kind != "cpu" else count
    count = available if count is None else count
    if devices and count > available:
        raise UserError(
            f"--devices {count}, but {available} {'is' if available == 1 else 'are'} visible; lower it, or "
            "look at ASCEND_RT_VISIBLE_DEVICES"
        )
    if "network" in groups:
        yield from network.check(host, kind, max(len(devices), 1))
    if not devices:
        for group in ("operators", "collectives", "training"):
            if group in groups:
                yield Finding(group, "all", Outcome.LEFT_OUT, f"no {kind} can be used, see host above")
        return
    if "operators" in groups:
        try:
            yield from kernels.check(host, kind, operators)
        except KeyError as error:
            raise UserError(f"--operators: {error.args[0]}") from error
    if "collectives" in groups:
        yield from collectives.check(host, kind, count)
    if "training" in groups:
        for golden in trainings(kind, count):
            yield golden if isinstance(golden, Finding) else training.check(host, golden)


def trainings(kind: str, count: int) -> Iterator:
    """The golden training on one device in both dtypes, and in float32 over as many devices as divide its rows; or the
    finding that says why not.
    """
    from mindvl_jax.golden import steps as golden
    from npu_bridge.doctor.training import Golden

    stored = json.loads(golden.STORED.read_text())
    own = golden.digest(golden.batches(golden.configuration(compute_dtype="float32", device=None).model)[1])
    if own != stored["batches"]:
        made = stored["made"]["numpy"]
        yield Finding(
            "training",
            "data",
            Outcome.FAILED,
            f"this numpy makes other random batches ({own}) than the stored losses were made with "
            f"({stored['batches']}, numpy {made})",
            f"install numpy {made}, or store the losses anew on a machine without an NPU: "
            "python -m mindvl_jax.golden.steps --store",
        )
        return
    made = f"jax {stored['made']['jax']} on {stored['made']['machine']}"
    losses = stored["losses"]
    # bfloat16: another order of roundings may move a loss about as far as bfloat16 itself is from float32.
    narrow = max(abs(a - b) / b for a, b in zip(losses["bfloat16"], losses["float32"]))
    command = [sys.executable, "-m", "mindvl_jax.golden.steps", "--device", kind]
    yield Golden("float32, 1 device", command, losses["float32"], FLOAT32, made)
    yield Golden("bfloat16, 1 device", [*command, "--compute-dtype", "bfloat16"], losses["bfloat16"], 2 * narrow, made)
    places = max(n for n in (1, 2, 4, 8) if n <= count and golden.ROWS % n == 0)
    if places > 1:
        launched = [sys.executable, "-m", "npu_bridge.launch", "--nproc", str(places), *command[1:]]
        yield Golden(f"float32, {places} devices", launched, losses["float32"], FLOAT32, made)


class _Display:
    """A line a finding as it comes, the fixes together at the end."""

    def __init__(self):
        from rich.console import Console

        self.console, self.group = Console(highlight=False), ""

    def line(self, finding: Finding) -> None:
        from rich.markup import escape

        if finding.group != self.group:
            self.group = finding.group
            self.console.print(f"[bold]{finding.group}[/]")
        style = STYLES[finding.outcome]
        self.console.print(
            f"  [{style}]{finding.outcome.value:<8}[/] {escape(finding.check)}: {escape(finding.found)}", soft_wrap=True
        )

    def end(self, findings: Sequence[Finding]) -> None:
        from rich.markup import escape

        fixes = [finding for finding in findings if finding.fix]
        if fixes:
            self.console.print("\n[bold]what to do[/]")
        for number, finding in enumerate(fixes, 1):
            self.console.print(
                f"  {number}. [{STYLES[finding.outcome]}]{finding.outcome.value}[/] "
                f"{finding.group}/{escape(finding.check)}: {escape(finding.fix)}",
                soft_wrap=True,
            )
        counts = {outcome: sum(finding.outcome is outcome for finding in findings) for outcome in Outcome}
        self.console.print(
            "\n" + ", ".join(f"[{STYLES[outcome]}]{n} {outcome.value}[/]" for outcome, n in counts.items() if n)
        )
