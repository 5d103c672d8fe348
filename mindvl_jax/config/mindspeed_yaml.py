"""The YAML of a native FSDP2 run of MindSpeed-MM as one of our configurations.

Its keys are brought into the terms of the three files of a Megatron run, which `config.mindspeed` translates; keys
without such a term are accounted for here. Its defaults differ from Megatron's (clipping, schedule, warm-up, decay), so
those that the file leaves out are written out and said.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml

from mindvl_jax.config.mindspeed import Fate, ImportedRun, Key, Run, flat, read_text
from mindvl_jax.core.errors import UserError

SCRIPT = {
    "training.lr": "lr",
    "training.lr_min": "min-lr",
    "training.lr_decay_style": "lr-decay-style",
    "training.lr_warmup_ratio": "lr-warmup-fraction",
    "training.weight_decay": "weight-decay",
    "training.clip_grad": "clip-grad",
    "training.adam_beta1": "adam-beta1",
    "training.adam_beta2": "adam-beta2",
    "training.adam_eps": "adam-eps",
    "training.micro_batch_size": "micro-batch-size",
    "training.train_iters": "train-iters",
    "training.seed": "seed",
    "training.save": "save",
    "training.save_interval": "save-interval",
    "training.val_interval": "eval-interval",
    "training.lora.rank": "lora-r",
    "training.lora.alpha": "lora-alpha",
    "training.lora.target_modules": "lora-target-modules",
    "training.lora.dropout": "lora-dropout",
    "data.dataloader_param.num_workers": "num-workers",
}
"""Keys that have a flag of the script."""
DEFAULTS = {
    "training.lr": 5e-5, "training.lr_min": 0.0, "training.lr_decay_style": "constant", "training.lr_warmup_ratio": 0.0,
    "training.weight_decay": 0.0, "training.clip_grad": 1.0, "training.adam_beta1": 0.9, "training.adam_beta2": 0.999,
    "training.micro_batch_size": 1, "training.train_iters": 10000, "training.seed": 42,
}  # fmt: skip
LORA = {
    "training.lora.rank": 8, "training.lora.alpha": 16,
    "training.lora.target_modules": ["q_proj", "k_proj", "v_proj"],
}  # fmt: skip
LOSSES = {
    "raw": None, "default": None, "per_sample_loss": "calculate-per-sample-loss",
    "per_token_loss": "calculate-per-token-loss",
}  # fmt: skip
PARTS = {
    "vision_encoder.freeze": r"(model\.)?visual",
    "vision_projector.freeze": r"(model\.)?visual(\.(merger|deepstack_merger_list))?",
    "text_decoder.freeze": r"(model\.)?language_model|model",
}
"""Frozen modules that hold each of our parts: the tower holds the projector there."""
_COMPUTED = "files, logs and how it is computed there; runs here save and continue whole"
_SAME = {
    r"parallel\..*": "how it is spread there; here by `mesh`",
    r"tools\..*|training\.(save_\w+|load_format|load_strict|manual_gc_interval|use_deter_comp|adam_fused)": _COMPUTED,
    r"training\.(no_(load|save)_(optim|rng)|log_interval|plugin)": _COMPUTED,
    r"features\.(chunkloss_plan|enable_\w+|skip_moe_pad_tokens)(\..*)?": _COMPUTED,
    r"model\.(model_id|trust_remote_code|attn_implementation)": "config.json of the weights decides",
    r"data\.dataset_param\.dataset_type": "samples are read and encoded while training",
    r"data\.dataloader_param\..*": "samples come in a random order, epoch by epoch; padding bears no loss",
    r"training\.lora\.enable": "see adapters",
}
_LOST = {
    r"training\.(lr_scaling_plan|no_decay_modules|quantization_plan)(\..*)?": (
        "rates, decay or precision of single modules; see learning_rate_multipliers and no_decay"
    ),
    r"training\.lora\.\w+": "another start of the adapters",
    r"features\.router_aux_loss_coef|model\.mtp_.*": "a further term of the loss",
    r"training\.load": "weights of an earlier run: `mindvl convert dcp` first, then run.init_from",
}


def import_yaml(path: Path, *, devices: int) -> ImportedRun:
    """Translate a run.

    Args:
      devices: on which it ran there: the batch is a micro-batch times these and the accumulation.

    Raises:
      UserError: a file that cannot be read, or options that make no run here.
    """
    left = _read(path)
    script, data, model = _Renamed(left, "script"), _Renamed(left, "data"), _Renamed(left, "model")
    lora = bool(left.get("training.lora.enable", False))
    for key, name in SCRIPT.items():
        default = (LORA if lora else {}).get(key, DEFAULTS.get(key))
        if key.startswith("training.lora.") and not lora:
            left.pop(key, None)
            continue
        script.take(key, name, default)
    accumulation = left.pop("training.gradient_accumulation_steps", 1)
    total = script.values["micro-batch-size"] * accumulation * devices
    script.set("global-batch-size", total, "training.gradient_accumulation_steps")
    loss = left.pop("features.loss_cfg.loss_type", "raw")
    if loss not in LOSSES:
        raise UserError(f"{path}: features.loss_cfg.loss_type is {loss!r}; translated are {', '.join(LOSSES)}")
    if (flag := LOSSES[loss]) is not None:
        script.set(flag, True, "features.loss_cfg.loss_type")
    data.take("model.model_name_or_path", "model_name_or_path", None)
    for key in [key for key in left if key.startswith("data.dataset_param.")]:
        if not re.fullmatch("|".join(_SAME), key):
            data.take(key, key.removeprefix("data."), None)
    frozen = left.pop("model.freeze", None) or []
    for part_key, pattern in PARTS.items():
        model.set(part_key, any(re.fullmatch(pattern, part) for part in frozen), "model.freeze")
    unknown = [part for part in frozen if not any(re.fullmatch(pattern, part) for pattern in PARTS.values())]
    epochs, optimizer = left.pop("training.train_epochs", None), left.pop("training.optimizer", "adamw")
    run = Run(data.values, model.values, script.values)
    config = run.translate()
    keys = [_named(key, {"script": script, "data": data, "model": model}[key.file]) for key in run.keys]
    if unknown:
        keys.append(
            Key("yaml", "model.freeze", unknown, "lost", "parts of the model that are frozen there; see `train`")
        )
    if optimizer == "muon":
        config["training"]["optimizer"]["name"] = "muon"
    fate: Fate = "translated" if optimizer == "muon" else "same" if optimizer in ("adamw", "adamw_swap") else "lost"
    keys.append(Key("yaml", "training.optimizer", optimizer, fate, "training.optimizer.name"))
    if epochs is not None:
        keys.append(_epochs(config["training"]["phases"][0], epochs, script))
    return ImportedRun(config, [*keys, *_rest(left)])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("training"), dict):
        raise UserError(f"{path}: expected a run of MindSpeed-MM's FSDP2 (sections parallel, model, data, training)")
    return flat(content)


class _Renamed:
    """Values by their name in one file of a Megatron run, with where they came from."""

    def __init__(self, left: dict[str, Any], file: str):
        self._left, self.file = left, file
        self.values: dict[str, Any] = {}
        self.origin: dict[str, str] = {}
        self.assumed: set[str] = set()

    def take(self, key: str, name: str, default: Any) -> None:
        if key not in self._left and default is None:
            return
        if key not in self._left:
            self.assumed.add(name)
        self.set(name, self._left.pop(key, default), key)

    def set(self, name: str, value: Any, key: str) -> None:
        self.values[name], self.origin[name] = value, key


def _named(key: Key, renamed: _Renamed) -> Key:
    text = f"{key.text} (their default)" if key.name in renamed.assumed else key.text
    return dataclasses.replace(key, file="yaml", name=renamed.origin.get(key.name, key.name), text=text)


def _epochs(phase: dict[str, Any], epochs: float, script: _Renamed) -> Key:
    """Give the phase its length in epochs, unless the file says iterations too."""
    if "train-iters" not in script.assumed:
        return Key("yaml", "training.train_epochs", epochs, "lost", "train_iters is given too, and was taken")
    del phase["steps"], phase["warmup_steps"]
    phase |= {"epochs": epochs, "warmup_ratio": script.values["lr-warmup-fraction"]}
    return Key("yaml", "training.train_epochs", epochs, "translated", "training.phases[0].epochs")


def _rest(left: dict[str, Any]) -> list[Key]:
    keys = []
    for name, value in left.items():
        lost = next((text for pattern, text in _LOST.items() if re.fullmatch(pattern, name)), None)
        same = next((text for pattern, text in _SAME.items() if re.fullmatch(pattern, name)), None)
        if value in (None, 0, [], False) and lost is not None:
            keys.append(Key("yaml", name, value, "same", "not used"))
        elif lost is None and same is not None:
            keys.append(Key("yaml", name, value, "same", same))
        else:
            keys.append(Key("yaml", name, value, "lost", lost or "not known to this importer: look up what it does"))
    return keys
