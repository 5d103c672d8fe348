"""Twenty steps of an untouched transformers Trainer, and the same twenty of ours: data order, AdamW, clipping,
schedule, no packing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mindvl_jax.config.schema import MeshConfig, MixtureEntry, OptimizerConfig, PhaseConfig
from mindvl_jax.models.outline import outline_of
from mindvl_jax.models.vision_language.batch import BatchShape
from mindvl_jax.objectives.registry import make_objective
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.parity.reference import load_reference
from mindvl_jax.parity.samples import pack, random_sample, reference_inputs
from mindvl_jax.training.optimizer import learning_rates
from mindvl_jax.training.state import start_phase
from mindvl_jax.training.step import make_programs
from mindvl_jax.weights import load_parameters

STEPS, ROWS, TOKENS, PATCHES = 20, 2, 32, 32
PEAK, DECAY = 2e-3, 0.05


@pytest.fixture(scope="module")
def samples(family):
    config, rng = family("qwen2.5-vl").config, np.random.default_rng(11)
    shapes = [(4, ("image", (1, 4, 6)), 5), (12,), (2, ("image", (1, 4, 4)), 1, ("image", (1, 2, 4)), 2), (9,)]
    # Five batches seen four times, so that the loss falls and the optimizer's memory matters.
    return [random_sample(config, rng, *shapes[number % 4]) for number in range(ROWS * 5)] * 4


class Rows(torch.utils.data.Dataset):
    def __init__(self, samples, config):
        self.items = [reference_inputs(sample, config) for sample in samples]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def padded(items):
    """Right padding, images of all samples one after another: what every collator of this family does."""
    width = max(item["input_ids"].shape[1] for item in items)
    fill = dict(input_ids=0, attention_mask=0, labels=-100, mm_token_type_ids=0)
    batch = {
        key: torch.cat(
            [torch.nn.functional.pad(item[key], (0, width - item[key].shape[1]), value=value) for item in items]
        )
        for key, value in fill.items()
    }
    for key in ("pixel_values", "image_grid_thw"):
        found = [item[key] for item in items if key in item]
        if found:
            batch[key] = torch.cat(found)
    return batch


@pytest.fixture(scope="module")
def theirs(family, samples, tmp_path_factory):
    """Loss of each step, and which parameters the Trainer decays."""
    made = family("qwen2.5-vl")
    arguments = transformers.TrainingArguments(
        str(tmp_path_factory.mktemp("trainer")),
        per_device_train_batch_size=ROWS,
        max_steps=STEPS,
        learning_rate=PEAK,
        weight_decay=DECAY,
        lr_scheduler_type="linear",
        warmup_steps=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = type(
        "InOrder",
        (transformers.Trainer,),
        {"_get_train_sampler": lambda self, *_: torch.utils.data.SequentialSampler(self.train_dataset)},
    )(
        model=load_reference(made.folder).train(),
        args=arguments,
        train_dataset=Rows(samples, made.config),
        data_collator=padded,
    )
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    trainer.train()
    return (
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        decayed,
        [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry],
    )


def test_twenty_losses_equal_those_of_an_untouched_trainer(family, samples, theirs):
    made = family("qwen2.5-vl")
    want, decayed, rates_there = theirs
    # What it decays is its own affair (it keeps weight decay off norms by their names, which the tower's do not match):
    # ours is told.
    tower_norms = any("norm1" in name or "ln_q" in name for name in decayed)
    no_decay = ("language/**/scale", "**/bias") if tower_norms else ("**/scale", "**/bias")
    phase = PhaseConfig(
        name="all",
        steps=STEPS,
        mixture=(MixtureEntry(source="x"),),
        rows=ROWS,
        sequence_length=TOKENS,
        patches_per_row=PATCHES,
        learning_rate=PEAK,
        schedule="linear",
        warmup_steps=4,
        weight_decay=DECAY,
        max_pixels=PATCHES * 196,
    )
    optimizer = OptimizerConfig(no_decay=no_decay)
    mesh, outline = make_mesh(MeshConfig()), outline_of(made.config.model_copy(update=dict(param_dtype="float32")))
    trained = list(outline.shapes)

    def quick(function, donate_argnums=(), **shardings):
        return jax.jit(
            function, donate_argnums=donate_argnums, compiler_options={"xla_backend_optimization_level": 0}, **shardings
        )

    shape = BatchShape(ROWS, TOKENS, PATCHES, samples=8, images=64, windows=PATCHES, patch_dim=1176)
    programs = make_programs(
        outline,
        phase=phase,
        objective=make_objective(made.config, phase, loss_chunk=32),
        optimizer=optimizer,
        spec=shape.spec(),
        trained=trained,
        frozen=[],
        mesh=mesh,
        compile=quick,
    )
    state = start_phase(jax.device_put(load_parameters(made.folder, mesh=mesh)), trained, [], mesh)
    batch_of = functools.cache(
        lambda number: pack(
            [[sample] for sample in samples[ROWS * number : ROWS * (number + 1)]],
            made.config,
            made.reference,
            tokens=TOKENS,
            patches=PATCHES,
        )
    )
    ours = []
    rates = schedule_of_the_trainer(phase)
    np.testing.assert_allclose(rates, rates_there, rtol=1e-6)
    for number in range(STEPS):
        state, metrics = programs.train_step(state, jax.tree.map(jnp.asarray, batch_of(number % 5)), rates[number])
        ours.append(float(metrics["loss"]))
    relative = np.abs(np.array(ours) - want) / want
    assert want[-1] < 0.7 * want[0], f"the reference hardly learned: {want[0]:.3f} to {want[-1]:.3f}"
    assert relative.max() < 1e-4, (
        f"largest relative difference {relative.max():.1e} at step {relative.argmax()}\nours   {ours}\ntheirs {want}"
    )


def schedule_of_the_trainer(phase):
    """Its warm-up starts at rate 0 (so that its first step does nothing), ours does not: the rates are an argument of
    our step.
    """
    rising = phase.learning_rate * np.arange(phase.warmup_steps) / phase.warmup_steps
    falling = learning_rates(
        phase.model_copy(update=dict(steps=phase.steps - phase.warmup_steps, warmup_steps=0)), "test"
    )
    return np.concatenate([rising, falling]).astype(np.float32)
