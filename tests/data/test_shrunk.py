"""Images that a row has no room for: warned of, counted, or refused."""

from __future__ import annotations

import io
import json

import pytest
from data_toys import config, encoded, picture, record
from rich.console import Console

from mindvl_jax.core.errors import UserError
from mindvl_jax.data.epochs import count_steps
from mindvl_jax.data.media.geometry import shrinking
from mindvl_jax.data.sources.readers import Source
from mindvl_jax.models.loading import make_loader
from mindvl_jax.models.registry import spec_of
from mindvl_jax.models.vision_language.check import advice, check_source
from mindvl_jax.models.vision_language.example import ExampleEncoder
from mindvl_jax.models.vision_language.processor import cached_tokenizer, training_limits
from mindvl_jax.training.display import LiveLine


@pytest.fixture
def data(tmp_path):
    """Twelve samples with an image of 64 patches (112 x 112 pixels), four without any."""
    records = []
    for index in range(16):
        file = tmp_path / f"{index}.png"
        file.write_bytes(encoded(picture(index, 112, 112)))
        records.append(record(index, media=[file.name] if index % 4 else []))
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


def test_images_are_counted_when_the_row_shrinks_them_and_only_then(tmp_path, data):
    counted = {}
    for patches in (32, 64):
        loader = make_loader(
            config(
                tmp_path / str(patches),
                data,
                phase__patches_per_row=patches,
                phase__max_pixels=112 * 112,
                phase__sequence_length=96,
            ),
            0,
        )
        batches = [next(loader) for _ in range(4)]
        with_images = sum((batch.batch.image_lengths > 0).sum() for batch in batches)
        counted[patches] = (loader.counters["shrunk"], int(with_images))
        state = loader.state()
        loader.restore(state)
        assert loader.counters["shrunk"] == counted[patches][0], "a resumed run goes on counting"
        loader.close()
    assert counted[32][0] == counted[32][1] > 0
    assert counted[64][0] == 0 and counted[64][1] > 0


def test_the_warning_names_the_value_with_which_nothing_shrinks(tmp_path, data):
    phase = config(tmp_path, data, phase__patches_per_row=32, phase__max_pixels=112 * 112).training.phases[0]
    said = shrinking(phase, 14)
    assert (
        "patches_per_row has room for 32" in said
        and "Raise patches_per_row to 64" in said
        and "lower max_pixels to 6,272" in said
    )
    assert shrinking(phase.model_copy(update=dict(patches_per_row=64)), 14) is None
    assert shrinking(phase.model_copy(update=dict(max_pixels=6272)), 14) is None


def test_the_check_and_the_live_line_say_how_many_shrink(tmp_path, data):
    settings = config(tmp_path, data, phase__patches_per_row=32, phase__max_pixels=112 * 112)
    encoder = ExampleEncoder(settings.model, cached_tokenizer(settings.tokenizer), training_limits(settings, 0))
    found = check_source(
        Source("a", settings.data.sources["a"]), str(data), encoder, settings.model.vision, decode=False
    )
    assert found.shrunk == 12 and any(
        "12 samples have images that a row is too small for" in line for line in advice([found], None)
    )
    record = dict(phase="a", step=1, loss=1.0, step_seconds=1.0, tokens=1, samples=1, token_efficiency=1.0, shrunk=7)
    assert "shrunk 7" in LiveLine(Console(file=io.StringIO()), 2).text(record)


def test_samples_that_would_shrink_are_refused_when_asked(tmp_path, data):
    loader = make_loader(
        config(
            tmp_path,
            data,
            phase__patches_per_row=32,
            phase__max_pixels=112 * 112,
            data__on_shrink="refuse",
            data__max_error_rate=1.0,
        ),
        0,
    )
    batch = next(loader)
    assert loader.counters["shrunk"] == 0 and loader.counters["quarantined_by_reason"]["shrunk"] > 0
    assert not (batch.batch.image_lengths > 0).any()
    loader.close()
    with pytest.raises(UserError, match="needs 64 patches and has room for 32; raise patches_per_row"):
        next(
            make_loader(
                config(
                    tmp_path,
                    data,
                    phase__patches_per_row=32,
                    phase__max_pixels=112 * 112,
                    data__on_shrink="refuse",
                    data__on_error="raise",
                ),
                0,
            )
        )


def test_steps_of_an_epoch_are_those_after_which_the_loader_has_used_every_sample(tmp_path, data):
    settings = config(
        tmp_path, data, phase__steps=None, phase__epochs=3, phase__gradient_accumulation=2, data__packing_buffer=4
    )
    steps, exact = count_steps(settings, 0, spec_of(settings.model).processor)
    loader = make_loader(settings, 0)
    after = []
    for _ in range(2 * steps):
        next(loader)
        after.append(loader.counters["epochs"])
    loader.close()
    assert exact and after[-1] >= 3 > after[-3], after
