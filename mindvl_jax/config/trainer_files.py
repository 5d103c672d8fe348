"""Supervised fine-tuning runs of LLaMA-Factory (YAML) and ms-swift (`swift sft` script or YAML) as our configurations.

The keys that matter for vision-language models are translated; every other key is said: `same` where nothing that is
learned hangs on it, `lost` with what it would have changed, and lost too where it is not known. Defaults of theirs that
are not in the file are filled in and said as well, because ours differ.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mindvl_jax.config.mindspeed import LORA_TARGETS, ImportedRun, Key, options_of, read_json, read_text
from mindvl_jax.core.errors import UserError

STACKS = {"vision": "vision/blocks", "language": "language/layers"}
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How one trainer names what both have.

    Attributes:
      name: of the trainer. names: our term -> its key. defaults: by its key, where the file is silent.
      same: patterns of keys on which nothing that is learned hangs, with the reason. lost: those whose effect has no
        counterpart.
    """

    name: str
    names: Mapping[str, str]
    defaults: Mapping[str, Any]
    same: Mapping[str, str]
    lost: Mapping[str, str]


_COMPUTED = "how it is computed there; memory is spread by `mesh`"
_SAME = {
    r"(output|logging)_dir|overwrite_output_dir|save_only_model|plot_loss|report_to|run_name|logging_.*": "logs",
    r"deepspeed|fsdp.*|ddp_.*|use_.*_kernel|flash_attn|attn_impl|enable_liger_kernel": _COMPUTED,
    r"(vit_)?gradient_checkpointing.*|disable_gradient_checkpointing": "memory and time alone; see model.remat",
    r"preprocessing_.*|overwrite_cache|dataset_num_proc|lazy_tokenize|load_from_cache_file|dataloader_(?!num_workers).*|"
    r"cache_dir|tokenized_path|streaming": "samples are read and encoded while training",
    r"trust_remote_code|use_fast_tokenizer|do_train|bf16|pure_bf16|tf32|torch_dtype|per_device_eval_batch_size|"
    r"model_type|use_hf|group_by_length|padding_free|resume_from_checkpoint|include_num_input_tokens_seen": (
        "no effect on what is learned"
    ),
}
_LOST = {
    r"lora_dropout": "dropout on the adapters' input",
    r"(additional_target|modules_to_save)": "further modules that learn whole beside the adapters",
    r"(use_galore|use_apollo|use_badam|pissa_.*|init_weights|loraplus_.*|neftune_.*)": "another kind of training",
    r"(double_quantization|bnb_4bit_use_double_quant)": "scales of the base are quantised again there",
    r"(val_size|split_dataset_ratio)": "a part cut from the training file; write a file of it and name it in "
    "`validation`",
    r"(eval_.*|metric_for_best_model|load_best_model_at_end)": "checks of a held-out part; see `validation`",
    r"template": "their chat template; here the published format of the model, without a default system turn",
    r"video_(min|max)_pixels": "a limit of its own for a video frame; max_pixels holds for frames too",
    r"loss_scale": "another weight of the tokens",
}

_NAMES = {
    "rank": "lora_rank",
    "alpha": "lora_alpha",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "max_samples": "max_samples",
    "packing": "packing",
    "save_steps": "save_steps",
    "keep": "save_total_limit",
    "train_on_prompt": "train_on_prompt",
    "last_answer": "mask_history",
}

LLAMA_FACTORY = Dialect(
    "llamafactory",
    {
        **_NAMES,
        "weights": "model_name_or_path",
        "kind": "finetuning_type",
        "targets": "lora_target",
        "bits": "quantization_bit",
        "freeze_vision": "freeze_vision_tower",
        "freeze_projector": "freeze_multi_modal_projector",
        "freeze_language": "freeze_language_model",
        "length": "cutoff_len",
        "min_pixels": "image_min_pixels",
        "max_pixels": "image_max_pixels",
    },
    {
        "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True, "freeze_language_model": False, "cutoff_len": 2048,
        "image_min_pixels": 1024, "image_max_pixels": 589824, "learning_rate": 5e-5, "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8, "lr_scheduler_type": "linear", "weight_decay": 0.0, "adam_beta2": 0.999,
        "save_steps": 500,
    },
    _SAME,
    _LOST,
)  # fmt: skip
SWIFT = Dialect(
    "swift",
    {
        **_NAMES,
        "weights": "model",
        "kind": "train_type",
        "targets": "target_modules",
        "bits": "quant_bits",
        "freeze_vision": "freeze_vit",
        "freeze_projector": "freeze_aligner",
        "freeze_language": "freeze_llm",
        "length": "max_length",
        "min_pixels": "min_pixels",
        "max_pixels": "max_pixels",
    },
    {
        "train_type": "lora", "lora_rank": 8, "lora_alpha": 32, "target_modules": "all-linear", "freeze_vit": True,
        "freeze_aligner": True, "freeze_llm": False, "num_train_epochs": 3.0, "per_device_train_batch_size": 1,
        "lr_scheduler_type": "cosine", "weight_decay": 0.1, "adam_beta2": 0.95, "warmup_ratio": 0.05,
        "save_steps": 500,
    },
    _SAME,
    _LOST,
)  # fmt: skip


def read_options(path: Path, dialect: Dialect) -> dict[str, Any]:
    """Options of a run's file by their names: YAML, or for ms-swift also a script, which is read and not run.

    Raises:
      UserError: the file cannot be read, or holds no such run.
    """
    text = read_text(path)
    if path.suffix in (".yaml", ".yml", ".json"):
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not valid YAML ({error})") from error
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise UserError(f"{path}: expected a mapping of options")
        return content
    if dialect is not SWIFT:
        raise UserError(f"{path}: expected the YAML of a run of LLaMA-Factory")
    options = options_of(text, path, command=r"\bswift\s+sft\b|\bmegatron\s+sft\b")
    pixels = re.search(r"(?m)^\s*(?:export\s+)?MAX_PIXELS=(\d+)", text)
    return ({"max_pixels": pixels[1]} if pixels and "max_pixels" not in options else {}) | options


def import_trainer_file(path: Path, dialect: Dialect, *, devices: int, dataset_info: Path | None) -> ImportedRun:
    """Translate a run.

    Args:
      devices: on which it ran there: the batch is theirs times this.
      dataset_info: LLaMA-Factory's dataset_info.json; None: beside the data (`dataset_dir`).

    Raises:
      UserError: options that make no run here, datasets that are no local files.
    """
    run = _Run(read_options(path, dialect), dialect, path)
    config = run.translate(devices, dataset_info)
    return ImportedRun(config, run.keys, dialect.name)


class _Run:
    """Take options one by one; what is left at the end is looked up or lost."""

    def __init__(self, options: Mapping[str, Any], dialect: Dialect, path: Path):
        self._left, self._dialect, self._path = dict(options), dialect, path
        self.keys: list[Key] = []

    def take(self, name: str, ours: str, convert: Callable[[Any], Any] = str, default: Any = None) -> Any:
        """Value of an option (by our term or its own name), or their default; recorded as translated into `ours`."""
        key = self._dialect.names.get(name, name)
        given = self._left.pop(key, None)
        text = ours
        if given is None:
            given = self._dialect.defaults.get(key, default)
            if key not in self._dialect.defaults:
                return default
            text = f"{ours} (their default)"
        try:
            value = convert(given)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self._path}: {key} = {given!r}: {error or 'not understood'}") from error
        self.keys.append(Key(self._dialect.name, key, given, "translated", text))
        return value

    def say(self, name: str, value: Any, fate: Any, text: str) -> None:
        self.keys.append(Key(self._dialect.name, self._dialect.names.get(name, name), value, fate, text))

    def translate(self, devices: int, dataset_info: Path | None) -> dict[str, Any]:
        if (stage := self._left.pop("stage", "sft")) != "sft":
            raise UserError(f"{self._path}: stage {stage!r}; only supervised fine-tuning (sft) is translated")
        weights = self.take("weights", "run.init_from and tokenizer.path")
        if not weights:
            raise UserError(f"{self._path}: no {self._dialect.names['weights']}")
        sources = self._sources(dataset_info)
        adapters, trained = self._adapters()
        phase = self._phase(devices) | {"mixture": [{"source": name} for name in sources]}
        if adapters is None:
            phase["train"] = trained
        optimizer = {
            "b1": self.take("adam_beta1", "training.optimizer.b1", float, 0.9),
            "b2": self.take("adam_beta2", "training.optimizer.b2", float, 0.999),
            "eps": self.take("adam_epsilon", "training.optimizer.eps", float, 1e-8),
            "clip_norm": self.take("max_grad_norm", "training.optimizer.clip_norm", float, 1.0),
        }
        optim = self._left.pop("optim", "adamw_torch")
        if optim in ("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit"):
            optimizer["name"] = "adamw8bit"
            self.say("optim", optim, "same", "training.optimizer.name: adamw8bit")
        elif not str(optim).startswith("adamw_torch"):
            self.say("optim", optim, "lost", "another optimizer; AdamW here")
        data: dict[str, Any] = {"sources": sources, "train_on": "answers"}
        if self.take("train_on_prompt", "data.train_on: all", _flag, False):
            data["train_on"] = "all"
        if self.take("last_answer", "data.train_on: last_answer", _flag, False):
            data["train_on"] = "last_answer"
        data["workers"] = self.take("dataloader_num_workers", "data.workers", int, 2)
        data["video_fps"] = self.take("video_fps", "data.video_fps", float, 2.0)
        data["video_max_frames"] = self.take("video_maxlen", "data.video_max_frames", int, 128)
        checkpoint = {"every_steps": self.take("save_steps", "checkpoint.every_steps", int, 500)}
        if keep := self.take("keep", "checkpoint.keep", int):
            checkpoint["keep"] = keep
        config = {
            "run": {
                "dir": self.take("output_dir", "run.dir", str, "runs/imported"),
                "seed": self.take("seed", "run.seed", int, 42),
                "init_from": weights,
            },
            "model": {"remat": "full", "compute_dtype": "bfloat16"},
            **({"adapters": adapters} if adapters else {}),
            "tokenizer": {"path": weights},
            "data": data,
            "training": {"optimizer": optimizer, "phases": [phase]},
            "checkpoint": checkpoint,
        }
        if adapters:
            config["model"]["param_dtype"] = "bfloat16"
        self._account()
        return config

    def _phase(self, devices: int) -> dict[str, Any]:
        rows = self.take("per_device_train_batch_size", "training.phases[0].rows", int, 1) * devices
        steps = self.take("gradient_accumulation_steps", "training.phases[0].gradient_accumulation", int)
        if steps is None:
            steps = 1
            if self._dialect is SWIFT:  # fills a batch of 16
                steps = max(1, -(-16 // rows))
                self.say(
                    "gradient_accumulation_steps", None, "translated", f"{steps}, for a batch of 16 (their default)"
                )
        length = self.take("length", "training.phases[0].sequence_length and max_sample_length", int, 2048)
        most = self.take("max_pixels", "training.phases[0].max_pixels", int, 1003520)
        patches = 4 * -(-most // 784)  # an image at the limit, in patches of 14 pixels and whole groups of 2 x 2
        is_lora = "adapters" if any(key.name == self._dialect.names["rank"] for key in self.keys) else None
        rate = 1e-4 if is_lora else 1e-5  # ms-swift's
        phase = {
            "name": "sft",
            "rows": rows,
            "gradient_accumulation": steps,
            "sequence_length": length,
            "max_sample_length": length,
            "max_samples_per_row": 1,
            "patches_per_row": max(patches, 4 * length),
            "max_image_patches": patches,
            "min_pixels": max(3136, self.take("min_pixels", "training.phases[0].min_pixels", int, 3136)),
            "max_pixels": most,
            "learning_rate": self.take("learning_rate", "training.phases[0].learning_rate", float, rate),
            "schedule": self.take("lr_scheduler_type", "training.phases[0].schedule", _schedule, "linear"),
            "weight_decay": self.take("weight_decay", "training.phases[0].weight_decay", float, 0.0),
            "loss_reduction": "token",
        }
        epochs = self.take("num_train_epochs", "training.phases[0].epochs", float, 3.0)
        most_steps = self.take("max_steps", "training.phases[0].steps", int, -1)
        phase |= {"steps": most_steps} if most_steps > 0 else {"epochs": epochs}
        warmup = self.take("warmup_steps", "training.phases[0].warmup_steps", int, 0)
        ratio = self.take("warmup_ratio", "training.phases[0].warmup_ratio", float, 0.0)
        phase |= {"warmup_steps": warmup} if warmup else {"warmup_ratio": ratio} if ratio else {}
        if warmup or ratio:
            phase["warmup_from_zero"] = True
        packed = self.take("packing", "training.phases[0].max_samples_per_row", _flag, False)
        if self._left.pop("neat_packing", None) is not None or packed:
            phase["max_samples_per_row"] = 64
            self.say("packing", True, "translated", "samples of a row never attend to each other here")
        return phase

    def _adapters(self) -> tuple[dict[str, Any] | None, list[str]]:
        kind = self.take("kind", "adapters")
        frozen = {
            part: self.take(f"freeze_{part}", f"{part}/** learns or not", _flag)
            for part in ("vision", "projector", "language")
        }
        trained = [f"{part}/**" for part, is_frozen in frozen.items() if not is_frozen]
        if kind == "full":
            if not trained:
                raise UserError(f"{self._path}: every part is frozen, so nothing would learn")
            return None, trained
        if kind not in ("lora", "qlora"):
            raise UserError(f"{self._path}: {self._dialect.names['kind']} {kind!r}; full and lora are translated")
        rank = self.take("rank", "adapters.rank", int, 8)
        alpha = self.take("alpha", "adapters.alpha", float, 2.0 * rank)
        wanted = self.take("targets", "adapters.targets", _names)
        stacks = [stack for part, stack in STACKS.items() if not frozen[part]]
        if set(wanted) & {"all", "all-linear"}:
            targets = [f"{stack}/{block}/*" for stack in stacks for block in ("attention", "mlp")]
        else:
            if unknown := [name for name in wanted if name not in {**LORA_TARGETS, "o_proj": 0, "down_proj": 0}]:
                raise UserError(
                    f"{self._path}: LoRA on {unknown[0]}: known are {', '.join(LORA_TARGETS)}, o_proj, down_proj"
                )
            known = {**LORA_TARGETS, "o_proj": ("attention/output",), "down_proj": ("mlp/down",)}
            targets = [f"{stack}/{module}" for stack in stacks for name in wanted for module in known[name]]
        adapters: dict[str, Any] = {"targets": targets, "rank": rank, "alpha": alpha}
        if self.take("rslora", "adapters.rslora", _flag, False):
            adapters["rslora"] = True
        if self.take("dora", "adapters.dora", _flag, False):
            adapters["dora"] = True
        if bits := self.take("bits", "adapters.base: nf4", int):
            if bits != 4:
                raise UserError(f"{self._path}: a base in {bits} bits; four (NF4) are built")
            adapters["base"] = "nf4"
        return adapters, trained

    def _sources(self, dataset_info: Path | None) -> dict[str, Any]:
        most = self.take("max_samples", "data.sources.*.max_samples", int)
        common = {"max_samples": most} if most else {}
        names = _names(self._left.pop("dataset", None) or [])
        if not names:
            raise UserError(f"{self._path}: names no dataset")
        self.say("dataset", names, "translated", "data.sources")
        if self._dialect is SWIFT:
            sources: dict[str, Any] = {}
            for number, name in enumerate(names):
                file, _, count = name.partition("#")
                if not Path(file).suffix:
                    raise UserError(f"{self._path}: dataset {name!r} is no local file; download it and name the file")
                own = {"path": file, **common, **({"max_samples": int(count)} if count.isdigit() else {})}
                sources["train" if len(names) == 1 else f"train{number}"] = own
            return sources
        folder = Path(self.take("dataset_dir", "data.sources.*.path", str, "data"))
        media = self.take("media_dir", "data.sources.*.media_root", str)
        info = read_json(dataset_info or folder / "dataset_info.json")
        return {name: self._of_info(name, info, folder, media) | common for name in names}

    def _of_info(self, name: str, info: Mapping[str, Any], folder: Path, media: str | None) -> dict[str, Any]:
        entry = info.get(name)
        if not isinstance(entry, dict):
            raise UserError(f"{self._path}: dataset {name!r} is not in dataset_info.json")
        if "file_name" not in entry:
            raise UserError(f"{self._path}: dataset {name!r} comes from a hub; download it and give it a file_name")
        columns, tags = dict(entry.get("columns") or {}), dict(entry.get("tags") or {})
        ours = {
            "messages": "messages",
            "images": "images",
            "videos": "videos",
            "prompt": "question",
            "response": "answer",
        }
        found = {ours[theirs]: columns.pop(theirs) for theirs in [*columns] if theirs in ours}
        if entry.get("formatting", "alpaca") == "alpaca":
            found = {"question": "instruction", "answer": "output"} | found
        named = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        named |= {"system_tag": "system"}
        found |= {named[tag]: tags.pop(tag) for tag in [*tags] if tag in named}
        for key, value in {**columns, **tags}.items():
            self.say(f"dataset_info {name}.{key}", value, "lost", "a column or tag without a counterpart")
        for key in set(entry) - {"file_name", "formatting", "columns", "tags"}:
            self.say(f"dataset_info {name}.{key}", entry[key], "lost", "an option without a counterpart")
        source: dict[str, Any] = {"path": str(folder / entry["file_name"]), "media_root": media or str(folder)}
        return source | ({"columns": found} if found else {})

    def _account(self) -> None:
        """Say what becomes of every option that is left."""
        for key, value in self._left.items():
            lost = next((text for pattern, text in self._dialect.lost.items() if re.fullmatch(pattern, key)), None)
            same = next((text for pattern, text in self._dialect.same.items() if re.fullmatch(pattern, key)), None)
            if lost is not None:
                unused = value in (None, False, 0, 0.0, "false", "0", "0.0", "no")
                self.say(key, value, "same" if unused else "lost", "not used" if unused else lost)
            elif same is not None:
                self.say(key, value, "same", same)
            else:
                self.say(
                    key, value, "lost", "not known to this importer: look up what it does before you rely on the result"
                )


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in (*_TRUE, *_FALSE):
        return str(value).lower() in _TRUE
    raise ValueError("expected true or false")


def _names(value: Any) -> list[str]:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("expected names")
    return [name.strip() for name in value if name.strip()]


def _schedule(value: Any) -> str:
    name = {"constant_with_warmup": "constant"}.get(str(value), str(value))
    if name not in ("cosine", "linear", "constant"):
        raise ValueError("expected cosine, linear or constant")
    return name
