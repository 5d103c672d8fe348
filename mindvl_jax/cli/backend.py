"""`--backend` and `--device` of the commands that generate."""

from __future__ import annotations

import argparse
from typing import Any

from mindvl_jax.core.errors import UserError


def add_backend_arguments(parser) -> None:
    """Add `--backend` and `--device`."""
    parser.add_argument(
        "--backend",
        choices=("xla", "npu_bridge"),
        default="xla",
        help="what runs the model; npu_bridge: torch programs, on one device (default: %(default)s)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda", "npu"), help="of the bridge; default: cpu")


def chosen_programs(args: argparse.Namespace) -> Any | None:
    """Return what `Generator(programs=...)` takes for a command's arguments. None is XLA.

    Raises:
      UserError: arguments of which one leaves the other without a meaning; a device that is not here.
    """
    if args.backend == "xla":
        if args.device is not None:
            raise UserError(
                f"--device {args.device} is the bridge's; add --backend npu_bridge (XLA takes its device "
                "from JAX_PLATFORMS)"
            )
        return None
    if args.mesh:
        raise UserError(
            f"--mesh {args.mesh}: generation through npu_bridge runs on one device; leave --mesh out, or use "
            "--backend xla"
        )
    import jax

    from mindvl_jax.inference.backends import BridgePrograms

    # JAX opens the weights and traces on the host; the accelerator's memory is torch's alone.
    jax.config.update("jax_platforms", "cpu")
    return BridgePrograms(args.device or "cpu")
