"""Steps of a phase that is given in epochs. Rows are planned as training plans them, without reading a pixel."""

from __future__ import annotations

import math
from collections.abc import Callable

from mindvl_jax.config.schema import Config
from mindvl_jax.data.encoding import InlineEncoder
from mindvl_jax.data.loader import phase_seed, phase_stream
from mindvl_jax.data.packing.planner import Planner
from mindvl_jax.data.processor import MakeProcessor
from mindvl_jax.data.quarantine import Quarantine

EXACT = 5000
"""Samples that are planned to count steps. Longer phases are extrapolated from so many."""


def resolve_epochs(
    config: Config, make_processor: MakeProcessor, say: Callable[[str], None] = lambda line: None
) -> Config:
    """Return the configuration with the length of every phase in steps.

    The count depends on data, seed and sizes alone, so a run that goes on comes to the same steps.

    Raises:
      UserError: sources that cannot be read, or samples of which none can be used.
    """
    phases = []
    for index, phase in enumerate(config.training.phases):
        steps = phase.steps
        if phase.epochs is not None:
            say(f"counting the steps of {phase.name}: {phase.epochs:g} epochs of {', '.join(phase.sources)}")
            steps, exact = count_steps(config, index, make_processor)
            say(
                f"{phase.name}: {phase.epochs:g} epochs are {'' if exact else 'about '}{steps} steps"
                + ("" if exact else f" (from the lengths of {EXACT} samples)")
            )
        phases.append(phase.with_steps(steps))
    return config.model_copy(update=dict(training=config.training.model_copy(update=dict(phases=tuple(phases)))))


def count_steps(config: Config, index: int, make_processor: MakeProcessor) -> tuple[int, bool]:
    """Return (steps after which every source has been used `epochs` times, whether that is exact)."""
    phase = config.training.phases[index]
    stream = phase_stream(config, index, phase_seed(config, index))
    processor = make_processor(config, index)
    quarantine = Quarantine(None, policy="quarantine", max_rate=1.0, limit_in_a_row=min(2 * stream.records + 16, EXACT))
    planner = Planner(
        stream,
        InlineEncoder(stream, processor),
        processor,
        rows=phase.rows,
        buffer=config.data.packing_buffer,
        quarantine=quarantine,
        cache=None,
    )
    least = 0.0
    while least < phase.epochs - 1e-9 and quarantine.seen < EXACT:
        planner.next_rows()
        least = min(planner.epochs())
    exact = least >= phase.epochs - 1e-9
    batches = planner.batches if exact else planner.batches * phase.epochs / max(least, 1e-9)
    return math.ceil(batches / phase.gradient_accumulation), exact
