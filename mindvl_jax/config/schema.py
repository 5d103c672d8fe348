"""Configuration schema and validation. Imports no jax.

`load(path, overrides)` in `mindvl_jax.config.loader` reads YAML into these types; a typo never passes silently.
Defaults are given only for what no checkpoint defines: model sizes have none and come from a preset or the file.
"""

from __future__ import annotations

import collections
import difflib
import os
import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mindvl_jax.config.adapters import ADAPTER_PARAMETERS, AdaptersConfig
from mindvl_jax.config.base import Decay, ModelConfig, Name, Section, bounded
from mindvl_jax.config.families import AnyFamily

# --- run -------------------------------------------------------------------------------------------------------------


def _folder(value: str) -> str:
    """Raise ValueError for what cannot be the path of a folder that is to be made."""
    if not value.strip() or value != value.strip():
        raise ValueError("expected the path of a folder, without blanks at its ends")
    if any(len(os.fsencode(part)) > 255 for part in value.split("/")):
        raise ValueError("a part of the path is longer than the 255 bytes that a file system takes")
    return value


class RunConfig(Section):
    dir: Annotated[str, AfterValidator(_folder)] = Field(
        description="Run folder: config, metrics, checkpoints, scores and report."
    )
    seed: Annotated[int, bounded(2**32 - 1, least=0)] = 0
    resume: str = Field(
        "auto",
        description="`auto`: from the newest checkpoint of run.dir; `never`: start anew; or the path of a checkpoint, "
        "or RUN:best.",
    )
    init_from: str | None = Field(
        None,
        description="Weights to start from: one of our runs or a Hugging Face folder. Ignored when resuming. Without a "
        "`model` section the folder gives the model and the tokenizer too.",
    )


class BridgeConfig(Section):
    device: Literal["cpu", "cuda", "npu"] = "cpu"
    capture: bool = Field(True, description="Capture the whole step as a device graph where the device has graphs.")
    reduce_gradients_in_float32: bool = True


_Places = Annotated[int, bounded(10**6, least=-1)] | None


class MeshConfig(Section):
    """Devices along each axis; -1 on at most one axis takes what is left.

    Without any axis training takes all devices (`parallel.mesh.default_mesh`); with one of them the others are 1, so
    `data: 1` is a single device.
    """

    data: _Places = Field(None, description="Copies of the parameters, each with rows of its own.")
    fsdp: _Places = Field(None, description="Devices that parameters, optimizer and rows are spread over.")
    tensor: _Places = Field(None, description="Devices that each matrix product is spread over.")
    context: _Places = Field(
        None, description="Devices that the token and patch places of each row are spread over (see `parallel`)."
    )
    expert: _Places = Field(None, description="Devices that experts of routed layers, and rows, are spread over.")
    stage: _Places = Field(
        None,
        description="Pipeline stages that the decoder's layers are divided over; rows of the vision tower are spread "
        "over it (see `parallel`).",
    )

    @property
    def is_open(self) -> bool:
        """Whether no axis is set."""
        return all(size is None for _, size in self)

    @property
    def filled(self) -> MeshConfig:
        """Return the mesh with 1 for the axes that are not set."""
        return MeshConfig(**{axis: 1 if size is None else size for axis, size in self})

    @model_validator(mode="after")
    def _possible(self):
        sizes = {axis: getattr(self, axis) for axis in type(self).model_fields}
        if zero := [axis for axis, size in sizes.items() if size == 0]:
            raise ValueError(f"{', '.join(zero)} is 0; expected a number of devices, or -1 for what is left")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError("-1 on more than one axis; only one can take what is left")
        return self


class ParallelConfig(Section):
    """Use of the mesh's axes by compiled programs."""

    context_attention: Literal["ulysses", "all_gather", "ring"] = Field(
        "ulysses",
        description="With mesh.context > 1. ulysses: heads change places with tokens, so the axis must divide the "
        "heads; all_gather: each device gathers keys and values, whatever the heads; ring: keys and values travel from "
        "device to device, for rows too long to gather.",
    )
    sequence_norms: bool = Field(
        False,
        description="With mesh.tensor > 1: norms and the residual stream are spread over the tensor axis by places; a "
        "gather before and a scatter after each block replace its sums (sequence parallelism of Megatron).",
    )
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = Field(
        "1f1b",
        description="With mesh.stage > 1. gpipe: all forward passes first, so a stage keeps the inputs of all "
        "micro-batches; 1f1b: forward and backward in turn, as many inputs as stages lie ahead; interleaved: 1f1b of "
        "several chunks of layers a stage, for a shorter bubble and more exchanges; zero_bubble (ZB-H1): weight "
        "gradients apart, in the gaps of 1f1b, for one more recomputation of each chunk.",
    )
    pipeline_chunks: Annotated[int, bounded(10**3)] = Field(
        1,
        description="With pipeline_schedule interleaved: chunks of layers of each stage (virtual stages), at least 2.",
    )
    micro_batches: Annotated[int, bounded(10**6)] | None = Field(
        None,
        description="With mesh.stage > 1: micro-batches that the rows of a group of stages are cut into; empty: one "
        "for each row.",
    )

    @model_validator(mode="after")
    def _chunks(self):
        if (self.pipeline_chunks > 1) != (self.pipeline_schedule == "interleaved"):
            raise ValueError(
                f"pipeline_chunks {self.pipeline_chunks} with pipeline_schedule {self.pipeline_schedule}; expected 2 "
                "or more with interleaved, and 1 with the others"
            )
        return self


class DistributedConfig(Section):
    """Several hosts through jax.distributed; leave empty for one process."""

    coordinator: str | None = Field(
        None,
        description="host:port of process 0; `auto`: the launcher's (torchrun, Slurm, Kubernetes); empty: one process.",
    )
    processes: Annotated[int, bounded(10**6)] | None = None
    process_id: Annotated[int, bounded(10**6, least=0)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self):
        if self.processes is not None and self.process_id is not None and self.process_id >= self.processes:
            raise ValueError(f"process_id {self.process_id} of {self.processes} processes; they count from 0")
        return self


# --- tokenizer and data ----------------------------------------------------------------------------------------------


class TokenizerConfig(Section):
    path: str = Field(
        "qwen3",
        description="`qwen2.5` or `qwen3` (built from the published ranks of the dashscope package), a tokenizer.json, "
        "or a Hugging Face folder.",
    )
    id_table: str | None = Field(
        None, description="JSON list of the real token ids that the model's compact vocabulary keeps, in order."
    )
    template: Literal["qwen", "tokenizer"] = Field(
        "qwen", description="`qwen`: the published Qwen chat format; `tokenizer`: the folder's own chat template."
    )


class ColumnMapping(Section):
    """Names of a source's columns (MindSpeed-MM's `attr`)."""

    id: str = "id"
    images: str = "images"
    videos: str = "videos"
    messages: str = "messages"
    role: str = "role"
    content: str = "content"
    question: str = "question"
    answer: str = "answer"
    user: str = "user"
    assistant: str = "assistant"
    system: str = "system"
    tool: str = "tool"


class SourceConfig(Section):
    path: str = Field(description="File, folder or glob, or a URL of fsspec such as s3://, gs://, hf://datasets/.")
    format: Literal["auto", "mllm", "llava", "sharegpt", "jsonl", "parquet", "webdataset", "csv", "tsv", "arrow"] = (
        "auto"
    )
    media_root: str | None = Field(
        None, description="Folder that relative media paths start from; default: the folder of the file."
    )
    columns: ColumnMapping = ColumnMapping()
    max_samples: Annotated[int, bounded(2**31 - 1)] | None = None


class QuickstartDataConfig(Section):
    folder: str
    size: Literal["smoke", "standard", "long"] = "standard"


class DataConfig(Section):
    sources: dict[Name, SourceConfig] = Field(min_length=1)
    quickstart: QuickstartDataConfig | None = Field(
        None, description="Build the quickstart data into this folder first, unless it is there."
    )
    train_on: Literal["answers", "last_answer", "all"] = "answers"
    on_error: Literal["raise", "quarantine"] = "quarantine"
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    on_shrink: Literal["allow", "refuse"] = Field(
        "allow",
        description="Images with more patches than max_image_patches or a row: shrink and count them, or refuse.",
    )
    video_fps: Annotated[float, Field(gt=0, le=1000)] = 2.0
    video_max_frames: Annotated[int, bounded(100_000)] = 64
    resample: Literal["bicubic", "nearest", "reduced"] = "bicubic"
    workers: Annotated[int, bounded(1024, least=0)] = Field(
        0, description="Decoding processes; 0 decodes in a background thread."
    )
    prefetch: Annotated[int, bounded(1024)] = Field(4, description="Batches prepared ahead of the step.")
    packing_buffer: Annotated[int, bounded(1_000_000)] = Field(256, description="Samples that the packer looks ahead.")
    length_index: str | None = Field(
        None, description="Folder of lengths written by `mindvl data index`: each host then encodes its own rows alone."
    )
    cache_examples: bool = Field(False, description="Keep decoded samples in memory between epochs (small data only).")


class MixtureEntry(Section):
    source: str
    weight: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0


# --- training --------------------------------------------------------------------------------------------------------


class PhaseConfig(Section):
    """One phase: what is trained, on what, at which sizes and rates."""

    name: Name
    steps: Annotated[int, bounded(10**8)] | None = Field(
        None, description="Optimizer steps. Give either steps or epochs."
    )
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None,
        description="Passes over every source of the mixture, instead of steps, which are counted at the start.",
    )
    train: tuple[str, ...] = Field(
        ("**",),
        min_length=1,
        description="Globs over parameter paths (vision/**, projector/**, language/**) that learn; the rest is frozen.",
    )
    mixture: tuple[MixtureEntry, ...] = Field(min_length=1)
    rows: Annotated[int, bounded(2**20)] = Field(description="Rows of the global batch in one micro-step.")
    sequence_length: Annotated[int, bounded(2**24)] = Field(description="Token positions a row.")
    patches_per_row: Annotated[int, Field(ge=0, le=2**24)] = Field(
        0, description="Image patches a row; families that read images need it."
    )
    max_samples_per_row: Annotated[int, bounded(2**16)] = 64
    max_sample_length: Annotated[int, bounded(2**24)] | None = Field(
        None,
        description="Longest sample in tokens; longer ones are truncated at turn borders. Default: sequence_length.",
    )
    max_image_patches: Annotated[int, bounded(2**24)] | None = Field(
        None, description="Most patches of one image; follows from max_pixels when not given."
    )
    min_pixels: Annotated[int, bounded(2**31)] = 3136
    max_pixels: Annotated[int, bounded(2**31)] = 1003520
    gradient_accumulation: Annotated[int, bounded(2**20)] = 1
    learning_rate: NonNegativeFloat
    learning_rate_multipliers: dict[str, NonNegativeFloat] = Field(
        {}, description="Factor by parameter glob, first match wins."
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Layer-wise rates: in each stack of L layers, layer l (from 0) learns at the rate times "
        "layer_decay ** (L - 1 - l); weight decay goes with it.",
    )
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, bounded(10**8, least=0)] = 0
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Share of the phase's steps that warm up, in place of warmup_steps."
    )
    warmup_from_zero: bool = Field(
        False,
        description="The first step of the warm-up has rate 0 and the full rate comes one step later, as in Megatron "
        "and transformers; false: the first step has one part of it.",
    )
    final_learning_rate_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    weight_decay: NonNegativeFloat = 0.0
    loss_reduction: Literal["token", "sample", "micro_batch"] = Field(
        "token",
        description="token: over all label tokens of the global batch; sample: mean of sample means; micro_batch: mean "
        "of micro-batch means as MindSpeed-MM.",
    )
    keep_optimizer: bool = Field(
        False, description="Carry the moments of the phase before (same trained parts) instead of starting at zero."
    )

    @model_validator(mode="after")
    def _one_length(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "give steps or epochs" + (", not both" if self.steps is not None else ": how long the phase trains")
            )
        if self.warmup_ratio is not None and self.warmup_steps:
            raise ValueError("warmup_ratio and warmup_steps both say how long the rate rises; give one of them")
        if self.steps is not None and self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) is longer than the phase (steps {self.steps}); lower "
                "it, or give warmup_ratio"
            )
        return self

    def with_steps(self, steps: int) -> PhaseConfig:
        """Return the phase with its length in steps: what `epochs` and `warmup_ratio` come to."""
        warmup = self.warmup_steps if self.warmup_ratio is None else round(self.warmup_ratio * steps)
        return self.model_copy(
            update=dict(steps=steps, epochs=None, warmup_steps=min(warmup, steps), warmup_ratio=None)
        )

    @property
    def sources(self) -> list[str]:
        """Names of the mixture's sources, each once, in order."""
        return list(dict.fromkeys(entry.source for entry in self.mixture))


class OptimizerConfig(Section):
    name: Literal["adamw", "adamw8bit", "muon"] = Field(
        "adamw",
        description="adamw8bit: AdamW with the moments of matrices in 8 bits, 2 bytes a parameter in place of 8. muon: "
        "Muon for the matrices that `muon` names, AdamW for the rest.",
    )
    muon: tuple[str, ...] = Field(
        ("**/layers/**/kernel", "**/blocks/**/kernel", "**/experts/*", "projector/*/kernel"),
        description="Parameter globs of the matrices that Muon updates.",
    )
    muon_momentum: Decay = 0.95
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    clip_norm: NonNegativeFloat = Field(1.0, description="Largest global gradient norm; 0 does not clip.")
    no_decay: tuple[str, ...] = Field(("**/scale", "**/bias"), description="Parameter globs without weight decay.")
    shard_over_data: bool = Field(
        False,
        description="Split the optimizer's arrays and the gradients over mesh.data too (ZeRO, stage 1): gradients are "
        "scattered instead of summed, and updated parameters gathered. AdamW only.",
    )

    @model_validator(mode="after")
    def _whole_matrices(self):
        if self.shard_over_data and self.name == "muon":
            raise ValueError(
                "shard_over_data splits matrices that muon orthogonalises whole; use name: adamw, or mesh.fsdp in "
                "place of mesh.data to spread optimizer state"
            )
        return self


class FlowMatchingConfig(Section):
    """Noise distribution of flow matching."""

    times: Literal["uniform", "logit_normal"] = Field(
        "logit_normal", description="Law of the noise levels; logit_normal prefers the middle."
    )
    shift: PositiveFloat = Field(
        1.0, description="Noise levels t become shift * t / (1 + (shift - 1) * t); above 1 noisier ones are preferred."
    )
    condition_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Share of the samples whose class is withheld, for guidance."
    )
    target: Literal["velocity", "epsilon", "v"] = Field(
        "velocity",
        description="Prediction: velocity on the straight path of flow matching; epsilon (the noise) or v on the "
        "variance-preserving path of 1,000 betas.",
    )
    betas: Literal["linear", "scaled_linear"] = Field(
        "scaled_linear",
        description="Schedule of epsilon and v: linear from 0.0001 to 0.02 (DDPM), or linear in the square root from "
        "0.00085 to 0.012 (latent diffusion).",
    )
    zero_terminal_snr: bool = Field(
        False, description="Rescale the betas so that the last step is noise alone; of target v."
    )
    weighting: Literal["none", "min_snr", "bell"] = Field(
        "none",
        description="Weight of a sample's error by its noise level: min_snr for epsilon and v, bell for velocity.",
    )
    snr_gamma: PositiveFloat = Field(5.0, description="Cap of the signal-to-noise ratio in weighting min_snr.")

    @model_validator(mode="after")
    def _path_exists(self):
        if self.zero_terminal_snr and self.target != "v":
            raise ValueError(f"zero_terminal_snr needs target v, not {self.target}: at noise alone only v predicts")
        needed = {"min_snr": ("epsilon", "v"), "bell": ("velocity",)}.get(self.weighting)
        if needed and self.target not in needed:
            raise ValueError(f"weighting {self.weighting} is of target {' or '.join(needed)}, not {self.target}")
        return self


def _repeated(names: Iterable[str]) -> list[str]:
    """Names that occur more than once, upper and lower case alike: some file systems tell them not apart."""
    counts = collections.Counter(name.casefold() for name in names)
    return sorted(name for name, count in counts.items() if count > 1)


class TrainingConfig(Section):
    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    loss_chunk: Annotated[int, bounded(2**24)] = Field(1024, description="Tokens whose logits exist at one time.")
    flow_matching: FlowMatchingConfig = FlowMatchingConfig()
    max_bad_steps: Annotated[int, bounded(10**8)] = Field(
        10, description="Consecutive non-finite steps (each skipped and counted) before the run stops."
    )
    ema_decay: Decay | None = Field(
        None, description="Keep an exponential moving average of the parameters, such as 0.999; used as RUN:ema."
    )

    @model_validator(mode="after")
    def _names_once(self):
        if repeated := _repeated(phase.name for phase in self.phases):
            raise ValueError(f"phases named {', '.join(repeated)} more than once; each has files of its name")
        return self


class ValidationConfig(Section):
    """Loss on held-out samples while a phase trains."""

    source: str = Field(description="Name in data.sources; not trained on.")
    every_steps: Annotated[int, bounded(10**8)] = 200
    samples: PositiveInt | None = Field(512, description="A fixed random part of the source; null takes all of it.")


class CheckpointConfig(Section):
    every_steps: Annotated[int, bounded(10**8)] = 500
    keep: Annotated[int, bounded(100_000)] = 3
    keep_best: bool = Field(
        False, description="Also keep the checkpoint with the lowest validation loss (best.json names it)."
    )
    asynchronous: bool = True


class LoggingConfig(Section):
    tensorboard: bool = True
    to: tuple[Literal["wandb", "mlflow", "swanlab", "csv"], ...] = Field(
        (), description="Further trackers of the same numbers and of scores; their packages are extras."
    )
    project: str = Field("mindvl", description="Project or experiment of the trackers.")
    peak_flops: PositiveFloat | None = Field(
        None, description="Peak of one device in FLOP/s; known devices fill it; without it no MFU is shown."
    )
    every_steps: Annotated[int, bounded(10**8)] = 1


class ProfileConfig(Section):
    steps: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="First and last optimizer step to profile, counted over the whole run; see `mindvl profile`."
    )

    @model_validator(mode="after")
    def _in_order(self):
        if self.steps is not None and self.steps[0] > self.steps[1]:
            raise ValueError(f"steps {list(self.steps)}: the first step comes after the last")
        return self


METRIC_NAMES = (
    "exact_match", "exact_match_any_case", "contains", "anls", "relaxed_accuracy", "vqa_accuracy", "yes_no",
)  # fmt: skip
"""Names for `evaluation.tasks[].metric` and `mindvl evaluate --tasks`; `mindvl_jax.evaluation.metrics` computes
them."""


class EvaluationTask(Section):
    name: Name
    source: SourceConfig
    metric: str = Field(
        "exact_match",
        description="How an answer is scored: a name of METRIC_NAMES, or FILE.py:FUNCTION of your own.",
    )
    max_samples: Annotated[int, bounded(2**31 - 1)] | None = None
    max_new_tokens: Annotated[int, bounded(2**20)] = 32

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        if metric not in METRIC_NAMES and not re.fullmatch(r"[^\0]{1,4000}\.py:[A-Za-z_]\w{0,200}", metric):
            raise ValueError(f"there is no such metric; known are {', '.join(METRIC_NAMES)}, or FILE.py:FUNCTION")
        return metric


BENCHMARK_NAMES = (
    "docvqa_val", "infovqa_val", "chartqa_test", "ocrbench", "mme", "mmbench_dev_en", "ai2d_test", "mmmu_dev_val",
    "textvqa_val", "realworldqa",
    )  # fmt: skip
"""Names for `evaluation.benchmarks.tasks` and `mindvl evaluate --tasks`, see in `mindvl_jax.evaluation.benchmarks`."""


class BenchmarksConfig(Section):
    """Benchmarks scored once, at the end of the run, with their published prompts and metrics."""

    folder: str = Field(
        description="Folder with their files: lmms-eval's parquet or VLMEvalKit's TSV. Files marked as stand-ins are "
        "reported as such."
    )
    tasks: tuple[str, ...] = Field(min_length=1)
    max_samples: Annotated[int, bounded(2**31 - 1)] | None = Field(None, description="Only the first samples of each.")
    max_new_tokens: Annotated[int, bounded(2**20)] | None = Field(
        None, description="Longest answer in tokens, where a benchmark allows more."
    )

    @model_validator(mode="after")
    def _known_names(self):
        for name in self.tasks:
            if name not in BENCHMARK_NAMES:
                near = difflib.get_close_matches(name, BENCHMARK_NAMES, n=1, cutoff=0.3)
                raise ValueError(
                    f"there is no benchmark {name!r}{f'; did you mean {near[0]!r}?' if near else ''} Known "
                    f"are {', '.join(BENCHMARK_NAMES)}"
                )
        if repeated := sorted({name for name in self.tasks if self.tasks.count(name) > 1}):
            raise ValueError(f"tasks names {', '.join(repeated)} more than once")
        return self


class EvaluationConfig(Section):
    tasks: tuple[EvaluationTask, ...] = ()
    benchmarks: BenchmarksConfig | None = Field(
        None, description="Benchmark files to score at the end of the run, beside `tasks`."
    )
    after_phases: bool = Field(
        False, description="Also score at the end of each phase, so that each phase's gain is known."
    )
    phase_samples: Annotated[int, bounded(2**31 - 1)] | None = Field(
        None, description="Samples a task in those in-between evaluations."
    )
    language_only: bool = Field(
        True, description="Also score with the images taken away: what the language alone gives."
    )
    batch: Annotated[int, bounded(65536)] = 64
    min_pixels: Annotated[int, bounded(2**31)] | None = None
    max_pixels: Annotated[int, bounded(2**31)] | None = None
    ema: bool = Field(
        False, description="Score the moving average (training.ema_decay) in place of the newest parameters."
    )

    @model_validator(mode="after")
    def _possible(self):
        if repeated := _repeated(task.name for task in self.tasks):
            raise ValueError(f"tasks named {', '.join(repeated)} more than once; each has files of its name")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels ({self.min_pixels}) is larger than max_pixels ({self.max_pixels})")
        return self


class Config(Section):
    """One run, whole."""

    run: RunConfig
    backend: Literal["xla", "npu_bridge"] = "xla"
    bridge: BridgeConfig = BridgeConfig()
    mesh: MeshConfig = MeshConfig()
    parallel: ParallelConfig = ParallelConfig()
    distributed: DistributedConfig = DistributedConfig()
    compiler_flags: dict[str, str | bool | int | float] = Field(
        {}, description="Options of XLA for the programs of a step, over those that we set for the platform."
    )
    model: Annotated[ModelConfig, AnyFamily]
    adapters: AdaptersConfig | None = Field(
        None, description="Train low-rank adapters in place of the parameters themselves."
    )
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    training: TrainingConfig
    validation: ValidationConfig | None = Field(None, description="Score a held-out source by its loss while training.")
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="after")
    def _adapters_alone(self):
        """With adapters a phase that says nothing trains these alone: `**` would be a full fine-tune."""
        if self.adapters is None:
            return self
        phases = []
        for index, phase in enumerate(self.training.phases):
            if "**" in phase.train and "train" in phase.model_fields_set:
                raise ValueError(
                    f"training.phases[{index}].train is **, which would train the whole base beside the "
                    "adapters; leave it out to train the adapters alone, "
                    f"or name them and the parts that learn too, such as [{ADAPTER_PARAMETERS}, projector/**]"
                )
            phases.append(
                phase
                if "train" in phase.model_fields_set
                else phase.model_copy(update=dict(train=(ADAPTER_PARAMETERS,)))
            )
        object.__setattr__(self, "training", self.training.model_copy(update=dict(phases=tuple(phases))))
        return self

    @model_validator(mode="after")
    def _known_sources(self):
        if self.validation is not None and self.validation.source not in self.data.sources:
            raise ValueError(
                f"validation.source is {self.validation.source!r}, which data.sources does not have "
                f"({', '.join(self.data.sources)})"
            )
        if self.checkpoint.keep_best and self.validation is None:
            raise ValueError(
                "checkpoint.keep_best needs `validation`: the best checkpoint is the one with the lowest "
                "validation loss"
            )
        for index, phase in enumerate(self.training.phases):
            for entry in phase.mixture:
                if entry.source not in self.data.sources:
                    raise ValueError(
                        f"training.phases[{index}].mixture names source {entry.source!r}, which data.sources "
                        f"does not have ({', '.join(self.data.sources)})"
                    )
            for key, expected in self.model.phase_problems(phase).items():
                raise ValueError(f"training.phases[{index}].{key} {expected}")
            if phase.min_pixels > phase.max_pixels:
                raise ValueError(f"training.phases[{index}].min_pixels is larger than max_pixels")
        return self
