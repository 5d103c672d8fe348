"""Cache of compiled programs between commands.

Does not import jax: its settings are read when it is first imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mindvl_jax.core.files import private_folder


def cache_folder() -> Path:
    """Return the user's folder of compiled programs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindvl_jax" / "xla"


def share_compiled_programs() -> None:
    """Let every command find what an earlier one compiled. JAX's own settings win where they are given.

    Call it before jax is imported. Generation has many programs that compile in less than JAX's second, so shorter ones
    are kept too.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        if not private_folder(cache_folder()):
            print(
                f"note: {cache_folder()} is not used for compiled programs: it belongs to another user, others may "
                "write it, or it cannot be made. Set XDG_CACHE_HOME to a folder of your own",
                file=sys.stderr,
            )
            return
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_folder())
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
