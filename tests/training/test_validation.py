"""Validation while training: the loss of held-out samples, and the checkpoint that did best."""

import pytest

from mindvl_jax.checkpoints.names import named_folder, run_folder, variant
from mindvl_jax.cli.score import score
from mindvl_jax.config.loader import ConfigError
from mindvl_jax.config.schema import SourceConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_json, read_jsonl
from mindvl_jax.data.sources.readers import Source
from mindvl_jax.training.trainer import train
from mindvl_jax.training.validation import Best
from mindvl_jax.weights import open_model


@pytest.fixture(scope="module")
def held_out(assets):
    """Twelve of the squares, in a file of their own."""
    import pyarrow.parquet as pq

    path = assets / "held_out.parquet"
    pq.write_table(pq.read_table(assets / "squares.parquet").slice(0, 12), path)
    return path


def test_the_best_checkpoint_is_kept_and_its_loss_is_that_of_scoring_each_sample(run_config, held_out, tmp_path):
    # A rate of 30 ruins the second half, so the best step is neither the last nor among the newest.
    config = run_config(
        {"steps": 4}, {"steps": 4, "learning_rate": 30.0},
        data={"sources": {"held_out": {"path": str(held_out)}}}, validation={"source": "held_out", "every_steps": 2},
        checkpoint={"every_steps": 3, "keep": 1, "keep_best": True},
    )  # fmt: skip
    train(config)
    folder = tmp_path / "run"
    rows = read_jsonl(folder / "metrics.jsonl")
    losses = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert set(losses) == {2, 4, 6, 8}
    best = read_json(folder / "best.json")
    assert best == {"step": 4, "validation_loss": losses[4], "checkpoint": "checkpoints/4"} and losses[4] == min(
        losses.values()
    )
    assert sorted(int(child.name) for child in (folder / "checkpoints").iterdir() if child.name.isdigit()) == [4, 8]
    source = Source("held_out", SourceConfig(path=str(held_out)))
    opened = open_model(f"{folder}:best")
    assert opened.folder == folder / "checkpoints" / "4"
    lines = list(
        score(opened, [source[index] for index in range(len(source))], batch=4, min_pixels=784, max_pixels=784 * 4)
    )
    expected = sum(line["nll"] for line in lines) / sum(line["tokens"] for line in lines)
    assert abs(expected - losses[4]) < 1e-5, (expected, losses[4])
    quick = [row["step_seconds"] for row in rows if not row.get("includes_compilation")]
    log = (folder / "run.log").read_text()
    assert f"step 4: validation loss {losses[4]:.4f} (lowest so far)" in log and "done: 8 steps" in log
    assert all(seconds > 0 for seconds in quick), "the time of a check is not a step's"

    def resumed(name):
        own = config.run.model_copy(update={"dir": str(tmp_path / "again"), "resume": f"{folder}{name}"})
        return config.model_copy(update={"run": own})

    with pytest.raises(UserError, match="a moving average has no optimizer state to go on with"):
        train(resumed(":ema"))
    train(resumed(":best"))
    again = read_jsonl(tmp_path / "again" / "metrics.jsonl")
    assert [row["step"] for row in again] == [5, 6, 7, 8]
    assert [row["loss"] for row in again] == [row["loss"] for row in rows if row["step"] > 4]


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"\xff\xfe\x00", b'{"step": 4}', b'{"step": 99}', b"{" * 5000, None],
)
def test_a_damaged_best_step_is_said_and_looked_for_anew(tmp_path, content, caplog):
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    if content is not None:
        (tmp_path / "best.json").write_bytes(content)
    if content != b'{"step": 4}':
        with pytest.raises(UserError, match="best"):
            named_folder(f"{tmp_path}:best")
    best = Best(tmp_path, resumed=6)
    assert best.step is None and (content is None or "looked for anew" in caplog.text)


def test_a_validation_source_must_exist_and_keep_best_needs_one(run_mapping):
    from mindvl_jax.config.loader import from_mapping

    with pytest.raises(ConfigError, match="validation.source is 'nowhere', which data.sources does not have"):
        from_mapping(run_mapping(validation={"source": "nowhere"}))
    with pytest.raises(ConfigError, match="keep_best needs `validation`"):
        from_mapping(run_mapping(checkpoint={"keep_best": True}))


def test_the_best_of_a_run_that_keeps_none_is_refused_with_what_to_set(tmp_path):
    with pytest.raises(UserError, match=r"has no best checkpoint; train with `validation` and checkpoint.keep_best"):
        named_folder(f"{tmp_path}:best")
    (tmp_path / "best.json").write_text('{"step": "x"}')
    with pytest.raises(UserError, match="is damaged .*name a checkpoint"):
        named_folder(f"{tmp_path}:best")
    assert run_folder(f"{tmp_path}:best") == run_folder(f"{tmp_path}:ema") == tmp_path
    assert [variant(f"a{ending}") for ending in ("", ":ema", ":best")] == ["", "-ema", "-best"]
