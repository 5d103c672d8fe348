"""Scores of a run of several processes: the main one answers on its own devices, the others wait for it.

Answers need no other process, weights do: every process takes part in bringing them together, and then in an exchange
of one number about every second, so that none waits in one exchange for longer than the collectives allow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import Outline, Params
from mindvl_jax.parallel.mesh import mesh_of
from mindvl_jax.parallel.rules import parameter_shardings

_SECONDS = 1.0  # between two signs of life
_RUNNING, _DONE, _FAILED = range(3)


def for_scoring(params: Params, outline: Outline) -> Params | None:
    """Parameters as the main process scores them: with one process as they are.

    With several, whole ones over the main process's own devices (as axis fsdp); None in the others. Called by all of
    them; each parameter is whole on every device for a moment.
    """
    if jax.process_count() == 1:
        return params
    own = jax.local_devices()
    mesh = mesh_of(own, {"fsdp": len(own)})
    shardings = parameter_shardings(outline.axis_names, {path: value.shape for path, value in params.items()}, mesh)
    gathered: Params = {}
    for path, value in params.items():
        whole = multihost_utils.process_allgather(value, tiled=True)
        if jax.process_index() == 0:
            gathered[path] = jax.device_put(whole, shardings[path])
    return gathered if jax.process_index() == 0 else None


def in_main_process(work: Callable[[], None]) -> None:
    """Run `work` in the main process, and return in all of them when it is done.

    Raises:
      UserError: in the other processes, when it failed in the main one, where its own error is raised.
    """
    if jax.process_count() == 1:
        work()
        return
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised below, in the thread that the user sees
            errors.append(error)

    main = jax.process_index() == 0
    thread = threading.Thread(target=run, name="scoring", daemon=True)
    if main:
        thread.start()
    state = _RUNNING
    while state == _RUNNING:
        if main:
            thread.join(_SECONDS)
        here = _RUNNING if thread.is_alive() else _FAILED if errors else _DONE
        state = int(multihost_utils.process_allgather(np.int32(here))[0])  # the main process's number counts
    if errors:
        raise errors[0]
    if state == _FAILED:
        raise UserError("scoring failed in the main process; its output says why")
