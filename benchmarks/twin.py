"""The same model in transformers, trained as is usual there: packed with block-diagonal masks, or padded, one sample in
each row.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import torch

from benchmarks.workloads import Packed, normalised
from mindvl_jax.config.schema import OptimizerConfig
from mindvl_jax.models.layers.qwen_vl_reference import rope_index
from mindvl_jax.models.mindvl.config import MindVLConfig
from mindvl_jax.models.mindvl.reference import ComposedMindVL
from mindvl_jax.parity.reference import load_reference
from mindvl_jax.parity.samples import ParitySample, reference_inputs
from mindvl_jax.weights.errors import read_json
from mindvl_jax.weights.save import save_parameters

Inputs = dict[str, torch.Tensor]


class Twin(ComposedMindVL):
    """transformers' vision tower and decoder; positions are inputs, as in our batch."""

    def attend_by(self, implementation: str) -> None:
        """Select `eager` or `sdpa` attention in tower and decoder."""
        for part in (self.visual, self._decoder[0]):
            part.set_attn_implementation(implementation)

    def checkpoint_layers(self) -> None:
        for part in (self.visual, self._decoder[0]):
            part.gradient_checkpointing_enable()
        self.train()

    def loss(self, inputs: Inputs) -> torch.Tensor:
        """Mean negative log-likelihood of the labels, by transformers' own loss function."""
        embeds = self.model.embed_tokens(inputs["input_ids"])
        if "pixel_values" in inputs:
            features = self.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
            places = (inputs["input_ids"] == self.config.image_token_id)[..., None]
            embeds = embeds.masked_scatter(places, features.to(embeds.dtype))
        positions = inputs["positions"]
        self._positions = positions if self.sections else None
        return self._decoder[0](
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            position_ids=positions[0],
            labels=inputs["labels"],
            use_cache=False,
        ).loss


def make(config: MindVLConfig, parameters: Mapping[str, jax.Array]) -> Twin:
    """Build the twin with our parameters, through a folder in the published layout."""
    with tempfile.TemporaryDirectory() as scratch:
        save_parameters(Path(scratch), config, parameters)
        return load(Path(scratch), config)


def load(folder: Path, config: MindVLConfig) -> Twin:
    """Load the twin from a folder that `save_parameters` wrote."""
    twin = Twin(read_json(folder / "config.json"))
    twin.load_state_dict(load_reference(folder).state_dict())
    if config.text.tie_word_embeddings:
        twin.lm_head.weight = twin.model.embed_tokens.weight
    return twin


def packed_inputs(packed: Packed) -> Inputs:
    """Rows of several samples: a (B, 1, T, T) mask keeps them apart; the tower keeps images apart by itself."""
    batch = packed.batch
    segments = torch.tensor(batch.segment_ids)
    T = segments.shape[1]
    mask = (
        (segments[:, :, None] == segments[:, None, :])
        & (segments[:, :, None] > 0)
        & torch.ones(T, T, dtype=torch.bool).tril()
    )
    mask |= torch.eye(T, dtype=torch.bool)  # padding attends to itself: an empty softmax would be NaN
    labels = torch.full(segments.shape, -100)
    # Their loss shifts by one position: position t - 1 predicts the label of position t.
    learned = torch.tensor(batch.loss_weights > 0)
    labels[:, 1:] = torch.where(learned[:, :-1], torch.tensor(batch.targets[:, :-1]).long(), -100)
    return dict(
        input_ids=torch.tensor(batch.tokens).long(),
        labels=labels,
        attention_mask=mask[:, None],
        positions=torch.tensor(batch.positions).long().transpose(0, 1),
        **_pixels(packed.samples),
    )


def padded_inputs(samples: Sequence[ParitySample], config: MindVLConfig, twin: Twin) -> Inputs:
    """One sample in each row, padded to the longest."""
    each = [reference_inputs(sample, config) for sample in samples]
    T = max(len(sample.tokens) for sample in samples)

    def fill(row, value):
        return torch.nn.functional.pad(row, (0, T - row.shape[-1]), value=value)

    rows = {
        name: torch.cat([fill(one[name], value) for one in each])
        for name, value in (("input_ids", 0), ("labels", -100), ("attention_mask", 0))
    }
    positions = [rope_index(twin, one["input_ids"], one["mm_token_type_ids"], one) for one in each]
    return rows | dict(positions=torch.cat([fill(one, 0) for one in positions], dim=1), **_pixels(samples))


def _pixels(samples: Sequence[ParitySample]) -> Inputs:
    visuals = [visual for sample in samples for visual in normalised(sample).visuals]
    if not visuals:
        return {}
    return dict(
        pixel_values=torch.tensor(np.concatenate([visual.pixels for visual in visuals])),
        image_grid_thw=torch.tensor([visual.grid for visual in visuals]),
    )


def eager_masks(inputs: Inputs, dtype: torch.dtype = torch.float32) -> Inputs:
    """The same inputs for eager attention, which adds its mask to the scores."""
    mask = inputs["attention_mask"]
    if mask.ndim != 4:
        return inputs
    return inputs | dict(attention_mask=torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min))


def optimizer_of(
    twin: Twin, *, learning_rate: float, weight_decay: float, config: OptimizerConfig
) -> torch.optim.Optimizer:
    """torch's fused AdamW; norm scales and biases do not decay, as in our default."""
    plain = [parameter for name, parameter in twin.named_parameters() if parameter.ndim < 2]
    decayed = [parameter for name, parameter in twin.named_parameters() if parameter.ndim >= 2]
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(config.b1, config.b2), eps=config.eps, fused=True)


def trainer(
    twin: Twin, inputs: Inputs, optimizer: torch.optim.Optimizer, *, clip_norm: float, bfloat16: bool
) -> Callable[[], tuple[float, float]]:
    """Return a function that runs one step (forward, backward, clipping, AdamW) and returns (loss before the update,
    gradient norm).

    bfloat16: autocast over float32 masters, as ours computes in bfloat16 from float32 parameters.
    """
    device = next(twin.parameters()).device.type

    def step() -> tuple[float, float]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16) if bfloat16 else contextlib.nullcontext():
            loss = twin.loss(inputs)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), clip_norm)
        optimizer.step()
        return loss.detach().item(), norm.item()

    return step
