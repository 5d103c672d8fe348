"""Pictures from prompts, by a pipeline folder in the layout of diffusers.

Legend: B images, S text tokens, P latent tokens, C channels.

Parts are read one after another and dropped when done: text encoders first, then the transformer, then the
autoencoder, so the largest of them is the peak.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import Outline
from mindvl_jax.data.text.prompt_tokenizer import PromptTokenizer
from mindvl_jax.inference.diffusion.flow_schedule import FlowSchedule
from mindvl_jax.inference.diffusion.solvers import advance, begin, columns, guided, table
from mindvl_jax.models.frozen import kl_vae
from mindvl_jax.models.frozen.tensors import Tensors, check
from mindvl_jax.models.hf import ConfigReader, Rule
from mindvl_jax.objectives.paths import STRAIGHT
from mindvl_jax.weights.errors import WeightsError, read_json
from mindvl_jax.weights.tensors import as_arrays, read_tensors, to_parameters

DEFAULT_SIDE = 128  # latents along a side where no size is given

Show = Callable[[int, int, str], None]


def silent(done: int, total: int, label: str) -> None:
    """Show no progress."""


@dataclasses.dataclass(frozen=True)
class Wish:
    """What is to be drawn.

    Attributes:
      images: of each prompt.
      guidance: scale that a distilled model is told. cfg: scale of classifier-free guidance against `negative`; 1 does
        without.
      height, width: pixels; None is the pipeline's own size.
      text_length: tokens of the T5 encoder; its padding is attended, so another length is another picture.
      batch: images at one time; changes nothing else.
    """

    prompts: tuple[str, ...]
    images: int = 1
    negative: str = ""
    steps: int = 28
    guidance: float = 3.5
    cfg: float | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    text_length: int | None = None
    batch: int = 4


class PipelineFolder:
    """A pipeline folder whose settings have been read and found supported; weights are read when they are used.

    Subclasses (`systems.py`) say what a system adds to the way from prompts to pictures.

    Attributes:
      parts: folders that the system needs. text_length, cfg: the system's own, where a wish names none.
      warnings: of the last `draw`, such as prompts that were cut.
    """

    parts: tuple[str, ...]
    text_length: int
    cfg: float

    def __init__(self, folder: FilePath, dtype: str = "float32"):
        """Read every configuration of the folder.

        Raises:
          UserError: another pipeline, parts or settings that are not supported.
        """
        self.folder, self.dtype = folder, dtype
        self.warnings: list[str] = []
        content = read_json(folder / "model_index.json")
        named = {key for key, value in content.items() if isinstance(value, list) and any(value)}
        if extra := sorted(named - set(self.parts)):
            raise UserError(f"{folder}: parts that are not supported: {', '.join(extra)}")
        if missing := [part for part in self.parts if not (folder / part).is_dir()]:
            raise UserError(f"{folder}: folders that are missing: {', '.join(missing)}")
        self.schedule = FlowSchedule.read(read_json(folder / "scheduler" / "scheduler_config.json"))
        self.vae = kl_vae.KlVae.read(self.settings("vae"))
        reader = ConfigReader()
        config = self.read(reader)
        if reader.problems:
            count = len(reader.problems)
            raise WeightsError("\n".join([f"{folder / 'transformer'}: {count} problems", *reader.problems]))
        self.config = config.model_copy(update={"compute_dtype": dtype, "param_dtype": dtype})

    def read(self, reader: ConfigReader) -> ModelConfig | None:
        """Read the text encoders' settings, and the transformer's, which are returned."""
        raise NotImplementedError

    def settings(self, part: str) -> dict[str, Any]:
        return read_json(self.folder / part / "config.json")

    def size(self, wish: Wish) -> tuple[int, int]:
        """(height, width) in pixels.

        Raises:
          UserError: a side that is no multiple of a token's.
        """
        unit, default = 2 * self.vae.factor, DEFAULT_SIDE * self.vae.factor
        height, width = wish.height or default, wish.width or default
        if height % unit or width % unit or min(height, width) < unit:
            raise UserError(f"size {height} x {width}: sides must be multiples of {unit}")
        return height, width

    def noise(self, wish: Wish) -> np.ndarray:
        """(images, C, height, width) float32 latents. Image k's follow from the seed and k alone."""
        height, width = (side // self.vae.factor for side in self.size(wish))
        shape, key = (self.vae.latent_channels, height, width), jax.random.key(wish.seed)
        numbers = range(len(wish.prompts) * wish.images)
        return np.stack([np.asarray(jax.random.normal(jax.random.fold_in(key, k), shape)) for k in numbers])

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """(n, S, E) text states with their padding, and (n, E) pooled ones."""
        raise NotImplementedError

    def rules(self) -> Sequence[Rule]:
        """Published tensors of the transformer."""
        raise NotImplementedError

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The transformer."""
        raise NotImplementedError

    def velocity(self, model: Any, x: jax.Array, times: jax.Array, condition: Any, wish: Wish) -> jax.Array:
        """The transformer's prediction for latents (B, C, height, width)."""
        raise NotImplementedError

    def levels(self, steps: int, tokens: int) -> np.ndarray:
        """(steps + 1,) noise levels of a picture of so many tokens."""
        return self.schedule.levels(steps, tokens)

    def tokens(self, part: str, texts: Sequence[str], length: int | None) -> np.ndarray:
        """Ids (n, length); notes the prompts that were cut. None: the folder's own length."""
        tokenizer = PromptTokenizer(self.folder / part)
        ids, cut = tokenizer(texts, length or tokenizer.longest or 77)
        self.warnings += [f"prompt {k + 1} is longer than {ids.shape[1]} tokens and was cut ({part})" for k in cut]
        return ids

    def run(self, part: str, network: Callable[[Tensors, jax.Array], Any], *inputs: np.ndarray) -> Any:
        """What a frozen part makes of its inputs, as numpy; its weights are dropped afterwards."""
        values = as_arrays(read_tensors(self.folder / part), self.dtype)
        check(lambda tensors: network(tensors, *map(jnp.asarray, inputs)), values, str(self.folder / part))
        out = jax.jit(lambda values, *inputs: network(Tensors(values), *inputs))(values, *inputs)
        return jax.tree.map(np.asarray, out)

    def draw(self, wish: Wish, *, noise: np.ndarray | None = None, show: Show = silent) -> np.ndarray:
        """(images, height, width, 3) float32 in 0 .. 1, all images of the first prompt first.

        Args:
          noise: latents in place of `self.noise(wish)`. show: called with (done, total, what) as work goes on.

        Raises:
          UserError: a size, weights or settings that do not fit.
        """
        self.warnings = []
        self.size(wish)
        wish = dataclasses.replace(
            wish,
            cfg=self.cfg if wish.cfg is None else wish.cfg,
            text_length=wish.text_length or self.text_length,
        )
        texts = [*wish.prompts, wish.negative] if wish.cfg > 1 else list(wish.prompts)
        show(0, 1, "reading prompts")
        encoded = self.encode(texts, wish.text_length)
        noise = self.noise(wish) if noise is None else noise
        owner = np.repeat(np.arange(len(wish.prompts)), wish.images)
        latents = self._denoise(wish, noise, [part[owner] for part in encoded], [part[-1] for part in encoded], show)
        return self._decode(latents, wish.batch, show)

    def _denoise(self, wish: Wish, noise: np.ndarray, conditions: list, nothing: list, show: Show) -> np.ndarray:
        outline = Outline.of(self.build)
        where = self.folder / "transformer"
        show(0, 1, "reading the transformer")
        params = to_parameters(read_tensors(where), self.rules(), outline.shapes, str(where))
        params = jax.device_put(params)
        grid = (noise.shape[2] // 2, noise.shape[3] // 2)
        rows = columns(table("euler", STRAIGHT, self.levels(wish.steps, grid[0] * grid[1])))

        @jax.jit
        def step(params, carry, row, condition, without):
            model = outline.merge(params)

            def velocity(x, times, condition):
                return self.velocity(model, x, times, condition, wish)

            return advance(guided(velocity, condition, without, wish.cfg if wish.cfg > 1 else 1.0), carry, row)

        made, size = [], min(wish.batch, len(noise))
        total = -(-len(noise) // size) * wish.steps
        for start in range(0, len(noise), size):
            # The last batch is filled up, so that one program serves all.
            chosen = np.resize(np.arange(start, min(start + size, len(noise))), size)
            condition = [part[chosen] for part in conditions]
            without = [np.broadcast_to(part, (size, *part.shape)) for part in nothing]
            carry = begin(jnp.asarray(noise[chosen]))
            for number in range(wish.steps):
                show(start // size * wish.steps + number, total, "denoising")
                carry = step(params, carry, [column[number] for column in rows], condition, without)
                carry.x.block_until_ready()
            made.append(np.asarray(carry.x)[: len(noise) - start])
        show(total, total, "denoising")
        return np.concatenate(made)

    def _decode(self, latents: np.ndarray, batch: int, show: Show) -> np.ndarray:
        """In float32 whatever the rest: half precision overflows in published decoders."""
        values = as_arrays(read_tensors(self.folder / "vae"), "float32")
        latents = latents / self.vae.scaling + self.vae.shift
        pixels = np.zeros((1, 3, 2 * self.vae.factor, 2 * self.vae.factor), np.float32)

        def both(tensors: Tensors):
            small = jnp.zeros((1, self.vae.latent_channels, 2, 2), jnp.float32)
            return kl_vae.encode(self.vae, tensors, jnp.asarray(pixels)), kl_vae.decode(self.vae, tensors, small)

        check(both, values, str(self.folder / "vae"))
        decode = jax.jit(lambda values, latents: kl_vae.decode(self.vae, Tensors(values), latents))
        made = []
        for number, latent in enumerate(latents):  # one at a time: decoding holds the most memory of all
            show(number, len(latents), "decoding")
            made.append(np.asarray(decode(values, latent[None])))
        show(len(latents), len(latents), "decoding")
        return np.clip(np.concatenate(made) / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
