"""Run the device programs of generation as torch programs by npu_bridge.

    Generator(opened, programs=BridgePrograms("cpu"))

The condition of `decode`'s loop depends on data, so each round synchronises with the device once (`allow_host_sync`);
nothing else does. One device and one process; only the XLA programs support a mesh.
"""

from __future__ import annotations

from typing import Any

import npu_bridge
from mindvl_jax.core.errors import UserError
from mindvl_jax.inference import programs
from npu_bridge.errors import BridgeError


class BridgePrograms:
    """The functions of `mindvl_jax.inference.programs` with the same names and arguments.

    Args:
      device: "cpu", "cuda" or "npu", as for `npu_bridge.jit`.

    Raises:
      UserError: torch has no such device, or the package for it is missing.
    """

    def __init__(self, device: str = "cpu"):
        from npu_bridge.runtime.mesh import default_device  # torch is optional for generation on XLA

        try:
            default_device(device)
        except BridgeError as error:
            raise UserError(str(error)) from error

        def compiled(fn, **options):
            return npu_bridge.jit(fn, device=device, allow_host_sync=True, **options)

        def read_pictures(graphdef, params, batch):
            return programs.prefill.__wrapped__(graphdef, params, batch, has_pictures=True)

        def read_text(graphdef, params, batch):
            return programs.prefill.__wrapped__(graphdef, params, batch, has_pictures=False)

        self._read = {True: compiled(read_pictures, static_argnums=0), False: compiled(read_text, static_argnums=0)}
        self.prefill_pictures = compiled(programs.prefill_pictures.__wrapped__, static_argnums=0)
        self.prefill_seen = compiled(programs.prefill_seen.__wrapped__, static_argnums=0)
        self.cut = compiled(programs.cut.__wrapped__, static_argnums=5)
        self.prefill_after = compiled(programs.prefill_after.__wrapped__, static_argnums=0)
        self.last_logits = compiled(programs.last_logits.__wrapped__, static_argnums=0)
        self.first_tokens = compiled(programs.first_tokens.__wrapped__, static_argnums=3)
        self.admit = compiled(programs.admit.__wrapped__, donate_argnums=0)
        self.decode = compiled(programs.decode.__wrapped__, static_argnums=(0, 7), donate_argnums=3)
        self.unstack_layers = lambda graphdef, params: None  # a slice is a view there, and costs nothing
        self.new_slots, self.check, self.drafts = programs.new_slots, programs.check, programs.drafts
        self.release = compiled(programs.release.__wrapped__, donate_argnums=0)

    def prefill(self, graphdef, params, batch, *, has_pictures: bool) -> Any:
        return self._read[has_pictures](graphdef, params, batch)
