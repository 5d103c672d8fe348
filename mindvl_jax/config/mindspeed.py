"""A MindSpeed-MM run (data.json, model.json, shell script) as one of our configurations.

Every key is accounted for: `translated` into one of ours, `same` (our behaviour is that one, or the key changes nothing
that is learned) or `lost`, with what it would have changed. A key that this module does not know is lost too, so that
nothing passes in silence.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import operator
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from mindvl_jax.core.errors import UserError

PRESETS = {2048: "qwen2.5-vl-3b", 3584: "qwen2.5-vl-7b", 5120: "qwen2.5-vl-32b", 8192: "qwen2.5-vl-72b"}
LORA_TARGETS = {
    "linear_qkv": ("attention/query", "attention/key", "attention/value"),
    "linear_proj": ("attention/output",),
    "linear_fc1": ("mlp/gate", "mlp/up"),
    "linear_fc2": ("mlp/down",),
    "q_proj": ("attention/query",),
    "k_proj": ("attention/key",),
    "v_proj": ("attention/value",),
    "gate_proj": ("mlp/gate",),
    "up_proj": ("mlp/up",),
}


Fate = Literal["translated", "same", "lost"]


@dataclasses.dataclass(frozen=True)
class Key:
    """Translation of one MindSpeed-MM key. file: data, model or script; yaml."""

    file: str
    name: str
    value: Any
    fate: Fate
    text: str


@dataclasses.dataclass
class ImportedRun:
    """config: our configuration as plain data. keys: every key of theirs. trainer: its name at `mindvl import`."""

    config: dict[str, Any]
    keys: list[Key]
    trainer: str = "mindspeed"

    def lost(self) -> list[Key]:
        return [key for key in self.keys if key.fate == "lost"]

    def yaml(self) -> str:
        """The configuration, with what has no counterpart as comments on top."""
        lines = [
            f"# Written by `mindvl import {self.trainer}`. One sample a row, unless it packs there; raise sequence_length "
            "and max_samples_per_row to pack.",
            "# Without a counterpart:",
        ]
        lines += [f"#   {key.file} {key.name} = {json.dumps(key.value)}: {key.text}" for key in self.lost()] or [
            "#   nothing"
        ]
        return "\n".join(lines) + "\n" + yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True, width=120)


def import_run(data: Path, model: Path, script: Path) -> ImportedRun:
    """Translate the three files of a run.

    Raises:
      UserError: files that cannot be read, a script without a training command, options that make no run.
    """
    reader = Run(flat(read_json(data)), flat(read_json(model)), options_of(read_text(script), script))
    return ImportedRun(reader.translate(), reader.keys)


# --- reading their files ---------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def read_json(path: Path) -> Any:
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by their dotted path."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
}


def _number(text: str) -> int:
    """Value of shell arithmetic over integers. Nothing else is evaluated."""

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(text)

    return value(ast.parse(text.strip(), mode="eval").body)


def options_of(text: str, where: Path, *, command: str = r"\bpretrain_\w+\.py\b") -> dict[str, Any]:
    """Options of a script's training command: flag without dashes -> text, a list of texts, or True.

    Variables, `${NAME:-default}` and arithmetic are expanded; no command is run.

    Args:
      command: pattern of what starts the training.

    Raises:
      UserError: no line that matches, or a variable in it that the script does not set.
    """
    text = re.sub(r"(?m)^\s*#.*$", "", text).replace("\\\n", " ")
    values: dict[str, str] = {}

    def expand(raw: str) -> str:
        raw = re.sub(
            r"\$\(\((.*?)\)\)",
            lambda found: str(_number(expand(re.sub(r"(?<![\w${])([A-Za-z_]\w*)", r"$\1", found.group(1))))),
            raw,
        )

        def variable(found: re.Match) -> str:
            name, default = found.group(1) or found.group(3), found.group(2)
            if name in values:
                return values[name]
            return default if default is not None else found.group(0)

        return re.sub(r"\$(?:\{(\w+)(?::-([^}]*))?\}|(\w+))", variable, raw)

    try:
        for found in re.finditer(
            r"""(?m)^[ \t]*(?:export[ \t]+)?([A-Za-z_]\w*)=("(?:[^"\\]|\\.)*"|'[^']*'|\$\(\(.*?\)\)|[^\s;]*)""", text
        ):
            values[found.group(1)] = expand(found.group(2).strip("\"'"))
        starts = (re.search(rf"(?:{command})(.*)", line) for line in text.split("\n"))
        started = next((start for start in starts if start), None)
        if started is None:
            what = "pretrain_*.py" if "pretrain" in command else "swift sft"
            raise UserError(f"{where}: no line starts a {what}")
        words = shlex.split(re.split(r"\s(?:2>&1|\||>)", expand(started[1]).replace("\n", " "))[0])
    except (ValueError, SyntaxError, ZeroDivisionError) as error:
        raise UserError(f"{where}: cannot be read as a training script ({error})") from error
    if unset := [word for word in words if "$" in word]:
        raise UserError(f"{where}: {unset[0]} is not set in the script; write its value there")
    options: dict[str, Any] = {}
    current: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options[name] = current = [value] if equals else []
        else:
            current.append(word)
    return {name: True if not given else given[0] if len(given) == 1 else given for name, given in options.items()}


# --- keys that are not translated one by one
# ---------------------------------------------------------------------------

_COMPUTED = "how it is computed there, not what is learned"
_SAME = {  # pattern over "file name" -> why nothing is lost
    r"script (use-mcore-models|use-flash-attn|use-fused-.*|swiglu|no-masked-softmax-fusion|no-gradient-accumulation-fusion|normalization|transformer-impl)": _COMPUTED,
    r"script (use-distributed-optimizer|sequence-parallel|overlap-.*|variable-seq-lengths|context-parallel-algo|attention-softmax-in-fp32|ckpt-format)": _COMPUTED,
    r"script (distributed-(backend|timeout-minutes)|use-cpu-initialization|manual-gc.*|swap-attention|reuse-fp32-param|enable-dummy-optimizer)": _COMPUTED,
    r"script (tokenizer-type|vocab-size|make-vocab-size-divisible-by|max-position-embeddings|position-embedding-type|rotary-base)": "sizes come from config.json of the weights",
    r"script (num-layers|hidden-size|ffn-hidden-size|num-attention-heads|group-query-attention|num-query-groups|init-method-std|hidden-dropout|attention-dropout)":
        "ignored there too: model.json decides",
    r"script (mm-data|mm-model|mm-tool|log-tps|log-throughput|eval-iters)": "files and logs",
    r"script no-(load|save)-(optim|rng)": "runs here save and continue whole: optimizer, data position, random state",
    r"model (.*\.)?(model_id|num_layers|hidden_size|ffn_hidden_size|intermediate_size|llm_hidden_size|input_size|num_attention_heads|num_query_groups|vocab_size)":
        "config.json of the weights decides",
    r"model (.*\.)?(gated_linear_unit|add_bias_linear|disable_bias_linear|add_qkv_bias|normalization|layernorm_epsilon|activation_func|group_query_attention|post_layer_norm)":
        "config.json of the weights decides",
    r"model (.*\.)?(in_channels|patch_size|spatial_merge_size|temporal_patch_size|tokens_per_second|window_attn_size|fullatt_block_indexes|max_position_embeddings|rope_theta)":
        "config.json of the weights decides",
    r"model (.*\.)?(position_embedding_type|mrope_section|untie_embeddings_and_output_weights|seq_length|init_method_std|attention_mask_type)": "config.json of the weights decides",
    r"model (.*\.)?(img_context_token_id|image_token_id|video_token_id|vision_start_token_id|vision_end_token_id)": "config.json of the weights decides; images and videos work in one run",
    r"model (.*\.)?(bf16|params_dtype|use_fused_rotary_pos_emb|bias_activation_fusion|parallel_output|attention_softmax_in_fp32|use_remove_padding|canonical_model|patch\..*)": _COMPUTED,
    r"data (.*\.)?(dataset_type|use_fast_tokenizer|split_special_tokens|cache_dir|overwrite_cache|preprocessing_(batch_size|num_workers)|preprocess_on_fly|async_.*)":
        "samples are read and encoded while training",
    r"data (.*\.)?(drop_last|pin_memory|dataloader_mode|shuffle|sampler_type|collate_param\.(model_name|ignore_pad_token_for_loss)|priority_mode|streaming)":
        "samples come in a random order, epoch by epoch; padding bears no loss",
}  # fmt: skip
_NEUTRAL = {  # pattern -> (value that changes nothing, what another value would have changed)
    r"script context-parallel-size": ("1", "rows would be spread over ranks; a row lies on one device here"),
    r"model (.*\.)?(hidden_dropout|attention_dropout)": (0.0, "dropout in the base model"),
    r"model (.*\.)?fp16": (False, "float16 with loss scaling; bfloat16 or float32 here"),
    r"model (.*\.)?rope_scaling": (None, "scaled rotary positions"),
    r"model (text_encoder|video_encoder|audio_encoder)": (None, "another encoder"),
    r"data (.*\.)?tool_format": (None, "their way to write tool calls"),
    r"data (.*\.)?attr\.(system|observation_tag|function_tag)": (None, "columns of tool calls under other names"),
    r"data (.*\.)?video_min_pixels": (0, "a lower limit of a video frame's pixels"),
    r"data (.*\.)?(packing|neat_packing)": (
        False,
        "several samples in a row; here: raise max_samples_per_row and sequence_length",
    ),
    r"data (.*\.)?(val_rate|val_max_samples)": (
        None,
        "a held-out part cut from the training file; write it to a file of its own and name it in `validation`",
    ),
    r"data (.*\.)?enable_thinking": (None, "their way to write reasoning"),
}


class Run:
    """Take keys one by one; what is left at the end is looked up above or lost."""

    def __init__(self, data: dict[str, Any], model: dict[str, Any], options: dict[str, Any]):
        self._left = {("data", name): value for name, value in data.items()}
        self._left |= {("model", name): value for name, value in model.items()}
        self._left |= {("script", name): value for name, value in options.items()}
        self.keys: list[Key] = []

    def take(
        self, file: str, name: str, ours: str, default: Any = None, convert: Callable[[Any], Any] = lambda value: value
    ) -> Any:
        """Value of a key whose name ends with `name`, recorded as translated into `ours`."""
        found = next(
            (key for key in self._left if key[0] == file and (key[1] == name or key[1].endswith("." + name))), None
        )
        if found is None:
            return default
        value = self._left.pop(found)
        try:
            made = convert(value) if value is not None else default
        except (TypeError, ValueError) as error:
            raise UserError(f"{file} {found[1]} = {value!r}: {error}") from error
        self.keys.append(Key(file, found[1], value, "translated", ours))
        return made

    def lose(self, file: str, name: str, text: str) -> None:
        if (file, name) in self._left:
            self.keys.append(Key(file, name, self._left.pop((file, name)), "lost", text))

    def translate(self) -> dict[str, Any]:
        weights = self.take("data", "model_name_or_path", "run.init_from and tokenizer.path", "weights")
        width = next(
            (
                value
                for (file, name), value in self._left.items()
                if file == "model" and name == "text_decoder.hidden_size"
            ),
            None,
        )
        optimizer = {
            "b1": self.take("script", "adam-beta1", "training.optimizer.b1", 0.9, float),
            "b2": self.take("script", "adam-beta2", "training.optimizer.b2", 0.999, float),
            "eps": self.take("script", "adam-eps", "training.optimizer.eps", 1e-8, float),
            "clip_norm": self.take("script", "clip-grad", "training.optimizer.clip_norm", 1.0, float),
        }
        tensor = self.take("script", "tensor-model-parallel-size", "mesh.tensor", 1, int)
        self._pipeline()
        phase, sources = self._phase(), self._sources()
        phase = {**phase, "mixture": [{"source": name} for name in sources if name != "validation"]}
        model: dict[str, Any] = {"preset": PRESETS[width]} if width in PRESETS else {}
        model |= {
            "remat": self._remat(),
            "compute_dtype": "bfloat16"
            if self.take("script", "bf16", "model.compute_dtype: bfloat16", False)
            else "float32",
            "param_dtype": "float32",
        }
        self.lose("script", "fp16", "float16 with loss scaling; bfloat16 or float32 here")
        adapters, trained = self._adapters()
        if not adapters:
            phase["train"] = trained
        config = {
            "run": {
                "dir": self.take("script", "save", "run.dir", "runs/imported"),
                "seed": self.take("script", "seed", "run.seed", 1234, int),
                "init_from": weights,
            },
            "mesh": {"data": 1, "fsdp": -1, "tensor": tensor},
            "model": model,
            **({"adapters": adapters} if adapters else {}),
            "tokenizer": {"path": weights},
            "data": self._data(sources),
            "training": {"optimizer": optimizer, "phases": [phase]},
        }
        self._rest_of_run(config, sources)
        self._account()
        return config

    def _pipeline(self) -> None:
        for name in (
            "pipeline-model-parallel-size",
            "virtual-pipeline-model-parallel-size",
            "num-layers-per-virtual-pipeline-stage",
        ):
            if self._left.get(("script", name)) == "1":
                self.keys.append(Key("script", name, self._left.pop(("script", name)), "same", "one stage"))
            self.lose(
                "script", name, "layers over pipeline stages: memory is spread by mesh.fsdp here; the same is learned"
            )
        for name in [name for file, name in self._left if file == "model" and name.endswith("pipeline_num_layers")]:
            self.keys.append(
                Key("model", name, self._left.pop(("model", name)), "same", "layers are not cut into stages")
            )
        for name in ("load", "load-base-model"):
            self.lose(
                "script",
                name,
                "weights in their layout: run.init_from is the Hugging Face folder; for a trained folder run "
                "`mindvl convert mindspeed` first",
            )

    def _phase(self) -> dict[str, Any]:
        micro = self.take("script", "micro-batch-size", "training.phases[0].rows", 1, int)
        total = self.take("script", "global-batch-size", "training.phases[0].rows x gradient_accumulation", micro, int)
        rows = next((size for size in (16, 8, 4, 2, 1) if total % (size * micro) == 0), 1) * micro
        length = self.take(
            "script", "seq-length", "training.phases[0].sequence_length and max_sample_length", 1024, int
        )
        length = self.take(
            "data", "cutoff_len", "training.phases[0].sequence_length and max_sample_length", length, int
        )
        rate = self.take("script", "lr", "training.phases[0].learning_rate", None, float)
        steps = self.take("script", "train-iters", "training.phases[0].steps", None, int)
        if rate is None or steps is None:
            raise UserError("the script gives no " + ("--lr" if rate is None else "--train-iters"))
        reduction = self._loss_reduction(micro, rows)
        if self._left.get(("script", "lr-decay-iters")) == str(steps):
            self.keys.append(
                Key(
                    "script",
                    "lr-decay-iters",
                    self._left.pop(("script", "lr-decay-iters")),
                    "same",
                    "the schedule ends with the phase",
                )
            )
        self.lose("script", "lr-decay-iters", "a schedule that ends before or after the run; ours ends with the phase")
        fraction = self.take("script", "lr-warmup-fraction", "training.phases[0].warmup_steps", 0.0, float)
        if abs(fraction * steps - round(fraction * steps)) > 1e-6:
            note = f"a warm-up of {fraction * steps:g} steps; here of {round(fraction * steps)}"
            self.keys.append(Key("script", "lr-warmup-fraction", fraction, "lost", note))
        most = self.take("data", "image_max_pixels", "training.phases[0].max_pixels", 768 * 768, int)
        patches = 4 * -(-most // 784)  # an image at the limit, in patches of 14 pixels and whole groups of 2 x 2
        return {
            "name": "sft",
            "steps": steps,
            "rows": rows,
            "gradient_accumulation": total // rows,
            "sequence_length": length,
            "max_sample_length": length,
            "max_samples_per_row": 1,
            "patches_per_row": max(patches, 4 * length),
            "max_image_patches": patches,
            "min_pixels": max(3136, self.take("data", "image_min_pixels", "training.phases[0].min_pixels", 0, int)),
            "max_pixels": most,
            "learning_rate": rate,
            "schedule": self.take("script", "lr-decay-style", "training.phases[0].schedule", "linear", _schedule),
            "warmup_steps": self.take(
                "script", "lr-warmup-iters", "training.phases[0].warmup_steps", round(fraction * steps), int
            ),
            "warmup_from_zero": True,
            "final_learning_rate_fraction": self.take(
                "script",
                "min-lr",
                "training.phases[0].final_learning_rate_fraction",
                0.0,
                lambda value: float(value) / rate if rate else 0.0,
            ),
            "weight_decay": self.take("script", "weight-decay", "training.phases[0].weight_decay", 0.01, float),
            "loss_reduction": reduction,
        }

    def _loss_reduction(self, micro: int, rows: int) -> str:
        reduction = "sample" if micro == 1 else "micro_batch"
        for option, ours in (("calculate-per-sample-loss", "sample"), ("calculate-per-token-loss", "token")):
            if self.take("script", option, f"training.phases[0].loss_reduction: {ours}", False):
                reduction = ours
        if reduction == "micro_batch":
            note = f"a mean over micro-batches of {micro} samples; here over those of {rows}, the rows of all devices"
            self.keys.append(Key("script", "micro-batch-size", micro, "lost", note))
        return reduction

    def _sources(self) -> dict[str, Any]:
        def take(name: str, ours: str, default: Any) -> Any:
            return self.take("data", name, f"data.sources.*.{ours}", default)

        root = take("dataset_dir", "media_root", None)
        columns = {
            "images": take("attr.images", "columns.images", "images"),
            "videos": take("attr.videos", "columns.videos", "videos"),
            "messages": take("attr.messages", "columns.messages", "messages"),
            "role": take("role_tag", "columns.role", "role"),
            "content": take("content_tag", "columns.content", "content"),
            "user": take("user_tag", "columns.user", "user"),
            "assistant": take("assistant_tag", "columns.assistant", "assistant"),
            "system": take("system_tag", "columns.system", "system"),
        }
        columns = {ours: theirs for ours, theirs in columns.items() if theirs is not None and theirs != ours}
        common = {"media_root": root, "columns": columns, "max_samples": take("max_samples", "max_samples", None)}
        common = {key: value for key, value in common.items() if value}
        files = take("basic_parameters.dataset", "path", None)
        if not files:
            raise UserError("data.json names no dataset (dataset_param.basic_parameters.dataset)")
        files = files.split(",") if isinstance(files, str) else files
        sources = {
            ("train" if len(files) == 1 else f"train{number}"): {"path": path.strip(), **common}
            for number, path in enumerate(files)
        }
        held_out = self.take("data", "val_dataset", "data.sources.validation and validation")
        return sources | (
            {"validation": {"path": held_out, **{key: value for key, value in common.items() if key != "max_samples"}}}
            if held_out
            else {}
        )

    def _data(self, sources: dict[str, Any]) -> dict[str, Any]:
        train_on = "all" if self.take("data", "train_on_prompt", "data.train_on", False) else "answers"
        train_on = "last_answer" if self.take("data", "mask_history", "data.train_on", False) else train_on
        if ("data", "dataset_param.basic_parameters.template") in self._left:
            self.keys.append(
                Key(
                    "data",
                    "dataset_param.basic_parameters.template",
                    self._left.pop(("data", "dataset_param.basic_parameters.template")),
                    "lost",
                    "their qwen2vl template puts the system turn 'You are a helpful assistant.' before "
                    "samples without one; here a sample has the turns it has",
                )
            )
        self.lose(
            "data",
            "dataset_param.preprocess_parameters.video_max_pixels",
            "a limit of its own for a video frame's pixels; max_pixels holds for frames too",
        )
        return {
            "sources": sources,
            "train_on": train_on,
            "resample": "nearest",
            "video_fps": self.take("data", "video_fps", "data.video_fps", 2.0, float),
            "video_max_frames": self.take("data", "video_maxlen", "data.video_max_frames", 128, int),
            "workers": self.take("script", "num-workers", "data.workers", 2, int),
        }

    def _remat(self) -> str:
        kind = self.take("script", "recompute-granularity", "model.remat", None)
        for name in [
            name for file, name in self._left if file == "model" and name.rsplit(".", 1)[-1].startswith("recompute_")
        ]:
            value = self._left.pop(("model", name))
            self.keys.append(
                Key("model", name, value, "same", "recomputation changes memory and time alone; see model.remat")
            )
            kind = value if name.endswith("recompute_granularity") and kind != "full" else kind
        for name in [name for file, name in self._left if file == "script" and name.startswith("recompute-")]:
            self.keys.append(
                Key(
                    "script",
                    name,
                    self._left.pop(("script", name)),
                    "same",
                    "recomputation changes memory and time alone; see model.remat",
                )
            )
        return {"full": "full", "selective": "attention", None: "none"}.get(kind, "full")

    def _adapters(self) -> tuple[dict[str, Any] | None, list[str]]:
        frozen = {
            part: self.take("model", f"{key}.freeze", f"training.phases[0].train without {part}/**", default)
            for part, key, default in (
                ("vision", "vision_encoder", True),
                ("projector", "vision_projector", False),
                ("language", "text_decoder", False),
            )
        }
        trained = [f"{part}/**" for part, is_frozen in frozen.items() if not is_frozen]
        rank = self.take("script", "lora-r", "adapters.rank", None, int)
        if rank is None:
            if not trained:
                raise UserError("model.json freezes every part and the script asks for no LoRA: nothing would learn")
            return None, trained
        wanted = self.take("script", "lora-target-modules", "adapters.targets", ["linear_qkv", "linear_proj"])
        wanted = [wanted] if isinstance(wanted, str) else wanted
        if unknown := [name for name in wanted if name not in LORA_TARGETS]:
            raise UserError(f"--lora-target-modules {unknown[0]}: known are {', '.join(LORA_TARGETS)}")
        stacks = [
            stack for part, stack in (("vision", "vision/blocks"), ("language", "language/layers")) if not frozen[part]
        ]
        targets = [f"{stack}/{module}" for stack in stacks for name in wanted for module in LORA_TARGETS[name]]
        if {"linear_qkv", "linear_fc1"} & set(wanted):
            self.keys.append(
                Key(
                    "script",
                    "lora-target-modules",
                    wanted,
                    "lost",
                    "one A shared by q, k and v (and by gate and up): here each has its own, as PEFT and "
                    "their canonical_model have it",
                )
            )
        dropout = self.take("script", "lora-dropout", "adapters.dropout", 0.0, float)
        if dropout:
            self.keys.append(Key("script", "lora-dropout", dropout, "lost", "dropout on the adapters' input"))
        return {
            "targets": targets,
            "rank": rank,
            "alpha": self.take("script", "lora-alpha", "adapters.alpha", 16.0, float),
        }, trained

    def _rest_of_run(self, config: dict[str, Any], sources: dict[str, Any]) -> None:
        config["checkpoint"] = {
            "every_steps": self.take("script", "save-interval", "checkpoint.every_steps", 1000, int)
        }
        config["logging"] = {"every_steps": self.take("script", "log-interval", "logging.every_steps", 1, int)}
        every = self.take(
            "script",
            "eval-interval",
            "validation.every_steps" if "validation" in sources else "no validation file, as there",
            1000,
            int,
        )
        if "validation" in sources:
            config["validation"] = {"source": "validation", "every_steps": every, "samples": None}

    def _account(self) -> None:
        """Say what becomes of every key that is left."""
        for (file, name), value in self._left.items():
            line = f"{file} {name}"
            neutral = next((entry for pattern, entry in _NEUTRAL.items() if re.fullmatch(pattern, line)), None)
            same = next((text for pattern, text in _SAME.items() if re.fullmatch(pattern, line)), None)
            if neutral is not None:
                unchanged = value == neutral[0] or value is None
                self.keys.append(
                    Key(file, name, value, "same" if unchanged else "lost", "not used" if unchanged else neutral[1])
                )
            elif same is not None:
                self.keys.append(Key(file, name, value, "same", same))
            else:
                self.keys.append(
                    Key(
                        file,
                        name,
                        value,
                        "lost",
                        "not known to this importer: look up what it does before you rely on the result",
                    )
                )


def _schedule(name: str) -> str:
    if name not in ("cosine", "linear", "constant"):
        raise ValueError("expected cosine, linear or constant")
    return name
