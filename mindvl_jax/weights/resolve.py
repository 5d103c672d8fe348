"""One door for weights: `open_model` takes one of our runs or a Hugging Face folder and gives back what inference
needs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mindvl_jax.checkpoints import id_table as vocabulary
from mindvl_jax.checkpoints.checkpoint import load_params, locate
from mindvl_jax.checkpoints.names import EMA, ID_TABLE, is_run, named_folder
from mindvl_jax.config.schema import Config, ModelConfig, TokenizerConfig
from mindvl_jax.core.params import flatten, in_nf4
from mindvl_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from mindvl_jax.models.adapters import attach_values
from mindvl_jax.models.hf import Pixels
from mindvl_jax.models.outline import outline_of
from mindvl_jax.weights.adapters import read_adapter
from mindvl_jax.weights.errors import WeightsError, read_json
from mindvl_jax.weights.load import load_parameters, require_finite
from mindvl_jax.weights.mapping import mapping_of, read_config

_FREE = ("size", "image_processor_type", "processor_class", "do_convert_rgb")
"""Keys of preprocessor_config.json that may differ: sizes are read, classes of other releases do the same."""
_PUBLISHED_PIXELS = (3136, 12845056)


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model with all that is needed to feed it.

    Attributes:
      model: the family's module with its parameters.
      config: the run's whole Config, or the model's own configuration for a Hugging Face folder.
      tokenizer: None when a Hugging Face folder has none.
      min_pixels, max_pixels: areas that images are resized into, in pixels.
      folder: where it came from.
    """

    model: nnx.Module
    config: Config | ModelConfig
    tokenizer: Tokenizer | None
    min_pixels: int
    max_pixels: int
    folder: Path

    @property
    def model_config(self) -> ModelConfig:
        return self.config.model if isinstance(self.config, Config) else self.config

    def parameters(self) -> dict:
        """Parameters by path."""
        return flatten(nnx.state(self.model, nnx.Param))


def open_model(folder: str | Path, mesh: Mesh | None = None, dtype=None) -> OpenedModel:
    """Open a run, one of its checkpoints, or a Hugging Face folder.

    Args:
      folder: its path; `RUN:ema` is the moving average that the run kept. A run with adapters opens with them, not
        merged.
      mesh: devices to spread over; None is the default device.
      dtype: of parameters and computation; None keeps the stored one (and a run's own compute dtype).

    Raises:
      WeightsError: no such folder, or nothing usable in it.
    """
    folder, ema = named_folder(folder)
    if not folder.is_dir():
        raise WeightsError(
            f"{folder}: no such folder; expected one of our runs, a checkpoint, or a Hugging Face folder"
        )
    if is_run(folder):
        return _open_run(folder, mesh, dtype, ema)
    if ema:
        raise WeightsError(
            f"{folder}{EMA}: a Hugging Face folder holds one set of weights; only runs with "
            "training.ema_decay have a moving average"
        )
    return _open_published(folder, mesh, dtype)


def _open_run(folder: Path, mesh: Mesh | None, dtype, ema: bool) -> OpenedModel:
    config, values = load_params(folder, mesh, ema=ema)
    config = config.model_copy(update=dict(tokenizer=vocabulary.of_run(locate(folder)[0], config.tokenizer)))
    if dtype is not None:
        name = jnp.dtype(dtype).name
        config = config.model_copy(
            update=dict(model=config.model.model_copy(update=dict(compute_dtype=name, param_dtype=name)))
        )
    require_finite(values, folder)
    if dtype is not None:
        values = {path: value if in_nf4(path) else value.astype(dtype) for path, value in values.items()}
    last = config.training.phases[-1]
    pixels = (config.evaluation.min_pixels or last.min_pixels, config.evaluation.max_pixels or last.max_pixels)
    return OpenedModel(
        outline_of(config.model, config.adapters).merge(values),
        config,
        load_tokenizer(config.tokenizer),
        *pixels,
        folder,
    )


def _open_published(folder: Path, mesh: Mesh | None, dtype) -> OpenedModel:
    config = read_config(folder)
    values = load_parameters(folder, config, mesh=mesh, dtype=dtype)
    stored = values["language/embed/embedding"].dtype
    compute = "bfloat16" if stored == jnp.bfloat16 else "float32"
    config = config.model_copy(update=dict(compute_dtype=compute, param_dtype=compute))
    tokenizer, pixels = open_companions(folder, config)
    return OpenedModel(outline_of(config).merge(values), config, tokenizer, *pixels, folder)


def add_adapter(opened: OpenedModel, folder: str | Path) -> OpenedModel:
    """The model with the adapter of a PEFT folder beside its base weights.

    Raises:
      UserError: the folder does not fit (see `read_adapter`), or the model has adapters already.
    """
    if isinstance(opened.config, Config) and opened.config.adapters is not None:
        raise WeightsError(
            f"{opened.folder} is a run with adapters of its own; merge it (`mindvl export --run "
            f"{opened.folder} --merge --out DIR`) before another is added"
        )
    adapter = read_adapter(Path(folder).expanduser(), opened.model_config)
    return dataclasses.replace(opened, model=attach_values(opened.model, adapter.layout, adapter.parameters))


def open_companions(folder: Path, config: ModelConfig | None = None) -> tuple[Tokenizer | None, tuple[int, int]]:
    """Tokenizer (None without a tokenizer.json) and pixel limits of a Hugging Face folder.

    Conversations are written by the folder's own chat template where it has one, as transformers writes them.

    Args:
      config: the folder's model, to which tokenizer and image processor must fit; None does not compare.

    Raises:
      WeightsError: files that are damaged, or settings of another model.
    """
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        table = folder / ID_TABLE
        tokenizer = load_tokenizer(TokenizerConfig(path=str(folder), id_table=str(table) if table.is_file() else None))
        if tokenizer.chat_template is not None:
            tokenizer.use_own_template()
        rows = None if config is None else config.text.vocab_size
        if rows is not None and tokenizer.largest_id >= rows:
            raise WeightsError(
                f"{folder}: tokenizer.json has ids up to {tokenizer.largest_id}, but the model's table has "
                f"{rows} rows: the tokenizer belongs to another model"
            )
    return tokenizer, _pixel_limits(folder, config)


def _pixel_limits(folder: Path, config: ModelConfig | None) -> tuple[int, int]:
    """Return pixel limits of an image processor's settings. Each release of transformers puts them elsewhere."""
    path, content = folder / "processor_config.json", None
    if path.is_file():
        content = read_json(path).get("image_processor")  # as transformers 5 writes it
    if content is None:
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            return _PUBLISHED_PIXELS
        content = read_json(path)
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: image_processor is a {type(content).__name__}; expected a JSON object")
    size = content.get("size") if isinstance(content.get("size"), dict) else {}
    limits = []
    for name, edge, default in (("min_pixels", "shortest_edge", 3136), ("max_pixels", "longest_edge", 1003520)):
        value = content.get(name) if content.get(name) is not None else size.get(edge, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1 <= value <= 1e12:
            raise WeightsError(f"{path}: {name} is {str(value)[:80]}; expected a number of pixels")
        limits.append(int(value))
    if hasattr(config, "vision"):
        _require_our_pixels(path, content, config)
    return limits[0], limits[1]


def _require_our_pixels(path: Path, content: dict, config: ModelConfig) -> None:
    """Raise WeightsError for settings under which another preparation of pixels would be right."""
    ours = mapping_of(config).companions(config, Pixels(0, 0)).get("preprocessor_config.json", {})
    wrong = []
    for name, value in ours.items():
        if name in _FREE:
            continue
        found = content.get(name, value)
        try:
            same = np.allclose(np.asarray(found, np.float64), np.asarray(value, np.float64), rtol=1e-4, atol=0)
        except (TypeError, ValueError):
            same = False
        if not same:
            wrong.append(f"{name} is {str(found)[:80]}, built is {value}")
    if wrong:
        raise WeightsError(f"{path}: images are prepared in a way that is not built: {'; '.join(wrong)}")
