"""JAX's own tests through the bridge: ``python -m tests.bridge.jax_tests <folder of jax's tests> [module ...]``.

The tests are those of jax's source release of the installed version; none of them is part of this project. A module may
also be one test, as unittest names it. Compared with XLA, by the tolerance that the test gives or `TOLERANCE`:

* what a test compares compiled and uncompiled (`JaxTestCase._CompileAndCheck`),
* the gradient of what it differentiates numerically (`check_grads`),
* each `jax.jit`ted function that it calls with arrays, up to `MOST_CALLS` calls of a function.

The bridge runs each function three times and all three results are compared. Where a result is further off than the
tolerance, it passes only within `SPREAD` times what XLA's own result moves when its arguments move by their last bit:
so far do rounding errors go in a system that is nearly singular. A loop whose trip count depends on data is
refused; it is run again with ``allow_host_sync`` and counted in a column of its own. Writes a table: passed, refused by
reason, wrong, crashed.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import pathlib
import random
import re
import signal
import sys
import unittest
from collections.abc import Callable
from typing import Any

MODULES = (
    "lax_test", "lax_numpy_test", "lax_numpy_indexing_test", "lax_numpy_reducers_test", "lax_numpy_operators_test",
    "lax_numpy_ufuncs_test", "lax_numpy_einsum_test", "lax_numpy_vectorize_test", "lax_numpy_setops_test",
    "lax_autodiff_test", "lax_vmap_test", "lax_vmap_op_test", "lax_control_flow_test", "lax_scipy_test",
    "lax_scipy_special_functions_test", "lax_scipy_sparse_test", "linalg_test", "fft_test", "scipy_fft_test",
    "scipy_stats_test",
    "scipy_signal_test", "scipy_ndimage_test", "scipy_interpolate_test", "scipy_spatial_test", "scipy_optimize_test",
    "nn_test", "random_test", "random_lax_test", "api_test", "batching_test", "shard_map_test", "image_test",
    "ode_test",
    "polynomial_test", "dtypes_test", "ann_test", "stax_test", "optimizers_test", "custom_api_test",
    "custom_linear_solve_test", "custom_root_test", "generated_fun_test", "jet_test", "sparse_bcoo_bcsr_test",
    "sparse_test",
    "mutable_array_test", "state_test", "experimental_rnn_test", "scaled_dot_test", "checkify_test", "pjit_test",
    )  # fmt: skip
OUTCOMES = ("passed", "with allow_host_sync", "refused", "wrong", "crashed")
TOLERANCE = {"float32": 2e-5, "complex64": 2e-5, "float64": 1e-11, "complex128": 1e-11, "float16": 4e-3,
    "bfloat16": 3e-2,
    "float8_e4m3fn": 0.13, "float8_e5m2": 0.26}  # fmt: skip
SPREAD = 8
MOST_CALLS = 3  # of one jitted function
MOST_COMPARISONS = 12  # in one test
MOST_SECONDS = 120  # for one test
_DATA_LOOP = "the number of rounds depends on data on the device"


class Record:
    """Outcome of each comparison."""

    def __init__(self) -> None:
        self.count: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.reasons: collections.Counter[str] = collections.Counter()
        self.found: list[tuple[str, str, str]] = []  # test, outcome, note

    def add(self, test: str, outcome: str, note: str = "") -> None:
        self.count[test.split(".", 1)[0]][outcome] += 1
        self.found.append((test, outcome, note))
        if outcome == "refused":
            self.reasons[note] += 1

    def of(self, test: str) -> int:
        """The number of comparisons of a test so far."""
        return sum(name == test for name, _, _ in self.found[-MOST_COMPARISONS:])

    def page(self, versions: str, share: str) -> str:
        """The table as Markdown."""
        total = collections.Counter()
        lines = ["# JAX's own tests through the bridge", "",
                 f"{versions}, one process on torch CPU, {share}; made by `make jax-tests`.", "",
                 "| Module | Comparisons | " + " | ".join(o.capitalize() for o in OUTCOMES) + " |",
                 "|---" * (len(OUTCOMES) + 2) + "|"]  # fmt: skip
        for module, found in sorted(self.count.items()):
            total.update(found)
            lines.append(f"| {module} | {found.total()} | " + " | ".join(str(found[o]) for o in OUTCOMES) + " |")
        shares = [f"{total[o]} ({100 * total[o] / max(total.total(), 1):.1f} %)" for o in OUTCOMES]
        lines.append(f"| **all** | {total.total()} | " + " | ".join(shares) + " |")
        absent = [m for m in MODULES if m not in self.count]
        if absent:
            lines += ["", f"Without a comparison here: {', '.join(absent)}."]
        faults = {f"{outcome}: {test}: {note}" for test, outcome, note in self.found if outcome in ("wrong", "crashed")}
        lines += ["", "Refused:", "", *[f"* {n}: {reason}" for reason, n in self.reasons.most_common()]]
        lines += ["", "Wrong and crashed:", "", *(f"* {fault}" for fault in sorted(faults) or ["none"])]
        return "\n".join(lines) + "\n"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def _reason(error: BaseException) -> str:
    """Reduce a refusal to its common text, without source lines and argument numbers."""
    text = re.sub(r"^\s*\d+\. ", "", str(error).splitlines()[-1])
    return re.sub(r" at \S*?:\d+[^:]*: | at .*?: ", ": ", text)[:160]


def _through_bridge(fun: Callable[..., Any], args: Any, named: dict[str, Any], options: dict[str, Any]) -> list[Any]:
    import jax

    import npu_bridge

    run = npu_bridge.jit(fun, **options)
    return [jax.tree.map(_plain, run(*args, **named)) for _ in range(3)]


def _plain(x: Any) -> Any:
    """An array as numpy's, with the bits of a random key."""
    import jax
    import numpy as np

    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(x))
    return np.asarray(x)


def _moved(x: Any, draw: Any) -> Any:
    """Move each float of an array by its last bit, up or down."""
    import jax
    import numpy as np

    if not isinstance(x, (np.ndarray, jax.Array)) or not jax.numpy.issubdtype(x.dtype, np.floating) or not x.size:
        return x
    x = np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
    signs = draw.choice([-1, 1], x.shape)
    return (x * (1 + signs * np.asarray(jax.numpy.finfo(x.dtype).eps))).astype(x.dtype)


def _within_spread(run: Callable[..., Any], args: Any, named: dict[str, Any], want: Any, got: Any) -> bool:
    """Whether the bridge is as near to XLA as XLA to itself with arguments that differ in their last bit."""
    import jax
    import numpy as np

    draw = np.random.RandomState(0)
    others = [run(*jax.tree.map(lambda x: _moved(x, draw), args), **named) for _ in range(4)]
    for a, b, *moved in zip(*(jax.tree.leaves(jax.tree.map(_plain, x)) for x in (want, got, *others)), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.dtype.kind in "biu":
            if not np.array_equal(a, b):
                return False
            continue
        a, b, *moved = (np.asarray(x, np.complex128 if a.dtype.kind == "c" else np.float64) for x in (a, b, *moved))
        spread = max(np.nanmax(np.abs(a - m), initial=0) for m in moved)
        off = np.nanmax(np.abs(a - b), initial=0)
        if not np.array_equal(np.isfinite(a), np.isfinite(b)) or off > SPREAD * spread:
            return False
    return True


class Watch:
    """Compares for the test that runs now."""

    def __init__(self, record: Record, xla_jit: Callable[..., Any]) -> None:
        self.record, self.case, self.busy, self.xla_jit = record, None, False, xla_jit

    @property
    def test(self) -> str:
        return f"{type(self.case).__module__}.{type(self.case).__name__}.{self.case._testMethodName}"

    def compare(self, fun: Callable[..., Any], args: Any, want: Any, *, named: dict[str, Any] | None = None,
                options: dict[str, Any] | None = None, tolerance: dict[str, Any] | None = None) -> None:  # fmt: skip
        """Run `fun` through the bridge and hold its three results against `want`."""
        import jax

        from npu_bridge.errors import BridgeError

        if self.case is None or self.busy or self.record.of(self.test) >= MOST_COMPARISONS:
            return
        self.busy, passed, options = True, "passed", options or {}
        try:
            try:
                found = _through_bridge(fun, args, named or {}, options)
            except BridgeError as error:
                if _DATA_LOOP not in str(error):
                    raise
                passed = "with allow_host_sync"
                found = _through_bridge(fun, args, named or {}, options | {"allow_host_sync": True})
            want = jax.tree.map(_plain, want)
            for call, got in enumerate(found):
                try:
                    given = tolerance if tolerance else {"rtol": TOLERANCE, "atol": TOLERANCE}
                    self.case.assertAllClose(got, want, check_dtypes=True, **given)
                except AssertionError as error:
                    statics = {k: v for k, v in options.items() if k != "allow_host_sync"}
                    if _within_spread(self.xla_jit(fun, **statics), args, named or {}, want, got):
                        continue
                    self.record.add(self.test, "wrong", f"call {call}: {' '.join(str(error).split())[:200]}")
                    return
            self.record.add(self.test, passed)
        except BridgeError as error:
            self.record.add(self.test, "refused", _reason(error))
        except Exception as error:
            self.record.add(self.test, "crashed", _first_line(error))
        finally:
            self.busy = False


def _watched_jit(jit: Callable[..., Any], watch: Watch) -> Callable[..., Any]:
    """`jax.jit` whose functions are also run by the bridge where a test calls them with arrays."""
    import jax
    from jax._src import core

    ours = ("static_argnums", "static_argnames", "donate_argnums", "donate_argnames", "keep_unused")

    class Watched:
        def __init__(self, fun: Callable[..., Any], given: dict[str, Any]) -> None:
            functools.update_wrapper(self, fun, updated=())
            self.fun, self.given, self.xla, self.calls = fun, given, jit(fun, **given), 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["xla"], name)

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            return self if instance is None else functools.partial(self, instance)

        def __call__(self, *args: Any, **named: Any) -> Any:
            leaves = jax.tree.leaves((args, named))
            seen = self.calls >= MOST_CALLS or watch.busy or not core.trace_state_clean()
            elsewhere = set(self.given) - set(ours) - {"inline"}
            if seen or elsewhere or not leaves or any(isinstance(x, core.Tracer) for x in leaves):
                return self.xla(*args, **named)
            self.calls += 1
            kept = args, named
            if "donate_argnums" in self.given or "donate_argnames" in self.given:
                kept = jax.tree.map(lambda x: x + 0 if isinstance(x, jax.Array) else x, kept)
            want = self.xla(*args, **named)
            options = {k: v for k, v in self.given.items() if k in ours and v is not None and "donate" not in k}
            watch.compare(self.fun, kept[0], want, named=kept[1], options=options)
            return want

    def watched(fun: Callable[..., Any] | None = None, /, **given: Any) -> Any:
        return functools.partial(watched, **given) if fun is None else Watched(fun, given)

    return watched


def _patch(watch: Watch) -> None:
    """Exchanges the comparisons that jax's tests share."""
    import jax
    import jax.test_util
    from jax._src import public_test_util, test_util

    def compile_and_check(
        self, fun, args_maker, *, check_dtypes=True, tol=None, rtol=None, atol=None, check_cache_misses=True
    ):
        args = args_maker()
        want = xla_jit(fun)(*args)
        rtol, atol = rtol or tol, atol or tol
        watch.compare(fun, args, want, tolerance={"rtol": rtol, "atol": atol} if rtol or atol else None)

    def check_grads(f, args, order, modes=("fwd", "rev"), atol=None, rtol=None, eps=None):
        def pulled(*args):
            out, pull = jax.vjp(f, *args)
            return out, pull(jax.tree.map(jax.numpy.ones_like, out))

        def pushed(*args):
            return jax.jvp(f, args, jax.tree.map(jax.numpy.ones_like, args))

        args = jax.tree.map(jax.numpy.asarray, tuple(args))
        both = pulled if "rev" in modes else pushed
        watch.compare(both, args, xla_jit(both)(*args))

    xla_jit = watch.xla_jit
    test_util.JaxTestCase._CompileAndCheck = compile_and_check
    for module in (jax.test_util, public_test_util, test_util):
        module.check_grads = check_grads
    jax.jit = _watched_jit(xla_jit, watch)


def _tests(suite: unittest.TestSuite):
    for item in suite:
        yield from _tests(item) if isinstance(item, unittest.TestSuite) else [item]


def _run(test: unittest.TestCase, watch: Watch) -> None:
    """One test. What its own assertions say is of no interest here: only the comparisons count."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {MOST_SECONDS} seconds")

    watch.case = test
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(MOST_SECONDS)
    try:
        test.run(unittest.TestResult())
    except (Exception, SystemExit) as error:
        print(f"{watch.test}: {_first_line(error)}", file=sys.stderr)
    finally:
        signal.alarm(0)
        watch.case = None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bridge.jax_tests", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="tests/ of jax's source release")
    parser.add_argument("modules", nargs="*", default=MODULES)
    parser.add_argument(
        "--each", type=int, default=40, help="tests drawn of each module, the same ones every time; 0 takes all"
    )
    parser.add_argument("--note", default="", help="what the page should say about how the record came about")
    parser.add_argument("--page", type=pathlib.Path, help="where the table is written")
    parser.add_argument(
        "--record",
        type=pathlib.Path,
        help="where each comparison is written, a line of JSON each; modules that it holds already are not run again",
    )
    given = parser.parse_args(arguments)
    if not given.folder.is_dir():
        parser.error(
            f"{given.folder} is no folder; unpack tests/ of the jax source release of the installed version and name it"
        )
    sys.path.insert(0, str(given.folder))

    import jax
    import torch
    from absl import flags

    flags.FLAGS([sys.argv[0]])  # what jax's tests read of their command line
    record = Record()
    for line in given.record.read_text().splitlines() if given.record and given.record.exists() else ():
        record.add(*json.loads(line))
    there = set(record.count)
    watch = Watch(record, jax.jit)
    _patch(watch)
    for module in given.modules:
        if module in there:
            continue
        try:
            suite = list(_tests(unittest.defaultTestLoader.loadTestsFromName(module)))
        except Exception as error:
            print(f"{module}: {_first_line(error)}", file=sys.stderr)
            continue
        chosen = suite if not given.each else random.Random(module).sample(suite, min(given.each, len(suite)))
        before = len(record.found)
        for test in chosen:
            _run(test, watch)
        jax.clear_caches()
        print(module, len(chosen), dict(collections.Counter(o for _, o, _ in record.found[before:])), flush=True)
        if given.record:
            given.record.write_text("".join(json.dumps(line) + "\n" for line in record.found))
    share = f"up to {given.each} tests drawn of each module" if given.each else "every test"
    tests = len({test for test, _, _ in record.found})
    page = record.page(
        f"jax {jax.__version__}, torch {torch.__version__}", f"{share}, {tests} of which compare something{given.note}"
    )
    print(page)
    if given.page:
        given.page.write_text(page)
    return int(any(found["wrong"] or found["crashed"] for found in record.count.values()))


if __name__ == "__main__":
    sys.exit(main())
