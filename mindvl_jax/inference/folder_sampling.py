"""Sampling settings of a published folder's generation_config.json: used on request, otherwise reported."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from mindvl_jax.checkpoints.names import run_folder
from mindvl_jax.core.errors import UserError, shortened
from mindvl_jax.inference.request import Sampling
from mindvl_jax.weights.errors import read_json

FILE = "generation_config.json"
BUILT = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Settings that change answers and are not built, with the value that changes nothing.
NOT_BUILT: dict[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0, "penalty_alpha": None, "typical_p": 1,
    "epsilon_cutoff": 0, "eta_cutoff": 0, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1,
    "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "sequence_bias": None, "guidance_scale": None, "min_length": 0,
    "min_new_tokens": None, "length_penalty": 1, "exponential_decay_length_penalty": None, "stop_strings": None,
    "dola_layers": None, "top_h": None, "watermarking_config": None,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FolderSampling:
    """Sampling settings of a folder.

    Attributes:
      settings: of `Sampling`, those that differ from greedy decoding. not_built: names of settings that are not built.
    """

    path: Path
    settings: dict[str, float]
    not_built: tuple[str, ...]

    @property
    def told(self) -> str:
        return ", ".join([*(f"{name} {value:g}" for name, value in self.settings.items()), *self.not_built])


def folder_sampling(weights: str | Path) -> FolderSampling:
    """Read the sampling settings of a folder; empty ones where it has none, or asks for greedy decoding.

    Raises:
      UserError: a file that is no JSON object, or values that `Sampling` refuses.
    """
    path = run_folder(weights) / FILE
    content = read_json(path) if path.is_file() else {}
    sampled = bool(content.get("do_sample", False))
    names = BUILT if sampled else ("repetition_penalty",)
    found: dict[str, float] = {}
    for name in names:
        value = content.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{path}: {name} is {shortened(repr(value), 80)}; expected a number")
        if value != getattr(Sampling(), name):
            found[name] = int(value) if name == "top_k" else float(value)
    if sampled:
        found.setdefault("temperature", 1.0)
    try:
        Sampling(**found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    others = tuple(name for name, plain in NOT_BUILT.items() if content.get(name) not in (None, plain, [], {}))
    return FolderSampling(path, found, others)


def sampling_for(weights: str | Path, mode: str, given: dict[str, Any], say: Any) -> dict[str, Any]:
    """Sampling settings of a command: the given ones over the folder's (`mode` folder), or alone (`mode` greedy).

    Args:
      given: settings of the command line that were set. say: called with a line when the folder's are not used.

    Raises:
      UserError: `folder` and the folder asks for something that is not built, or is damaged.
    """
    asked = folder_sampling(weights)
    if mode == "folder":
        if asked.not_built:
            raise UserError(
                f"{asked.path} asks for {', '.join(asked.not_built)}, which is not built; use --sampling greedy "
                "and set what you need"
            )
        return {**asked.settings, **given}
    if (asked.settings or asked.not_built) and not given:
        say(
            f"note: {asked.path.name} asks for {asked.told}; answers here are greedy. --sampling folder uses its "
            "settings"
        )
    return given
