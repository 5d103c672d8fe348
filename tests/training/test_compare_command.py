"""`mindvl compare`: equal trainings are found equal, others are not, and the cut of a configuration is exact."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import tokenizers
import yaml

from mindvl_jax.cli import compare as compare_command
from mindvl_jax.cli.compare import code_of, compare, read_losses, shortened, written
from mindvl_jax.cli.main import main
from mindvl_jax.config import loader as config_loader
from mindvl_jax.core.errors import UserError

ROOT = Path(__file__).parents[2]
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A configuration of two short phases on a few lines of text, for a model of two thousand parameters."""
    folder = tmp_path_factory.mktemp("compare")
    raw = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece: n for n, piece in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))},
            merges=[],
        )
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    raw.save(str(folder / "tokenizer.json"))
    lines = [
        {
            "id": str(n),
            "messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "abc"[n % 3] * 3}],
        }
        for n in range(12)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    phase = dict(
        mixture=[dict(source="text")],
        rows=2,
        sequence_length=96,
        patches_per_row=4,
        max_pixels=3136,
        learning_rate=1e-2,
        schedule="linear",
    )
    content = dict(
        run=dict(dir=str(folder / "unused"), seed=1),
        model=dict(
            vision=dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, fullatt_block_indexes=[0]),
            text=dict(
                family="qwen3",
                vocab_size=263,
                hidden_size=8,
                intermediate_size=16,
                num_layers=1,
                num_heads=2,
                num_kv_heads=1,
                head_dim=4,
                tie_word_embeddings=True,
                rope="1d",
            ),
            image_token_id=261,
            video_token_id=262,
            vision_start_token_id=259,
            vision_end_token_id=260,
            compute_dtype="float32",
        ),
        tokenizer=dict(path=str(folder / "tokenizer.json")),
        data=dict(sources=dict(text=dict(path=str(folder / "data.jsonl")))),
        training=dict(
            loss_chunk=32, phases=[dict(phase, name="one", steps=3, warmup_steps=2), dict(phase, name="two", steps=5)]
        ),
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


@pytest.fixture(scope="module", autouse=True)
def equal_sides_train_once(tmp_path_factory):
    """A side that was trained before (configuration, devices, processes, code; fresh weights of one seed) is taken from
    there.
    """
    train, done = compare_command.train_apart, {}

    def train_or_copy(name, config, root, log, **options):
        plain = yaml.safe_load(config.read_text())
        folder = Path(plain["run"].pop("dir"))
        fresh = Path(plain["run"].pop("init_from")) == folder.parent / "start"
        key = json.dumps([plain, str(root), options], sort_keys=True)
        if fresh and key in done:
            shutil.copytree(done[key], folder)
            return
        train(name, config, root, log, **options)
        if fresh:
            done[key] = shutil.copytree(folder, tmp_path_factory.mktemp("side") / "run")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_command, "train_apart", train_or_copy)
        yield


def test_a_configuration_is_cut_through_its_phases(path):
    config = config_loader.load(path)
    cut = shortened(config, steps=5, start="weights", folder="out")
    assert [(phase.name, phase.steps) for phase in cut.training.phases] == [("one", 3), ("two", 2)]
    assert (cut.run.init_from, cut.run.dir, cut.run.resume) == ("weights", "out", "never")
    first = shortened(config, steps=1, start="weights", folder="out").training.phases
    assert [(phase.steps, phase.warmup_steps) for phase in first] == [(1, 1)]
    with pytest.raises(UserError, match="more than the 8 steps"):
        shortened(config, steps=9, start="weights", folder="out")


def test_the_verdict_follows_the_largest_relative_difference():
    assert compare([2.0, 1.0], [2.0, 1.0], 0.0).passed
    outcome = compare([2.0, 1.0, 4.0], [2.0, 1.1, 4.0], 0.05)
    assert not outcome.passed and outcome.worst == 1
    assert outcome.relative[1] == pytest.approx(0.1 / 1.1)
    assert compare([2.0, 1.0], [2.0, 1.1], 0.1).passed


def test_a_loss_that_is_no_number_never_passes():
    outcome = compare([1.0, math.nan, 1.0], [1.0, 1.0, 2.0], 10.0)
    assert not outcome.passed and outcome.worst == 1


def test_a_run_that_stopped_early_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UserError, match="loss of 1 steps, expected 2"):
        read_losses(tmp_path / "metrics.jsonl", 2)


def test_two_meshes_train_alike(path, tmp_path, capsys):
    """Two real trainings in their own processes: one device, and two with fsdp."""
    out = tmp_path / "equal"
    code = main(
        [
            "compare",
            "--a",
            str(path),
            "--steps",
            "3",
            "--devices-a",
            "1",
            "--devices-b",
            "2",
            "--set-b",
            "mesh.fsdp=2",
            "--out",
            str(out),
        ]
    )
    assert code == 0, capsys.readouterr()
    found = json.loads((out / "compare.json").read_text())
    assert found["passed"] and len(found["a"]) == 3 and len(set(found["a"])) == 3
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_other_code_reads_what_was_set_and_nothing_that_it_may_not_know(path):
    cut = shortened(config_loader.load(path, ["run.seed=5"]), steps=2, start="weights", folder="out")
    told = yaml.safe_load(written(cut, whole=False))
    assert told["run"] == {"dir": "out", "seed": 5, "init_from": "weights", "resume": "never"}
    assert set(told["data"]) == {"sources"} and "optimizer" not in told["training"] and "bridge" not in told
    assert (
        config_loader.from_mapping(told) == cut == config_loader.from_mapping(yaml.safe_load(written(cut, whole=True)))
    )


def test_the_code_of_a_revision_lies_in_a_tree_of_its_own_that_goes_away():
    if subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    with code_of("HEAD") as tree:
        assert tree != ROOT and (tree / "mindvl_jax" / "training" / "trainer.py").is_file()
    assert (
        not tree.exists()
        and str(tree)
        not in subprocess.run(["git", "-C", str(ROOT), "worktree", "list"], capture_output=True, text=True).stdout
    )
    with (
        pytest.raises(UserError, match="revision 'no-such-revision' cannot be checked out"),
        code_of("no-such-revision"),
    ):
        pass


def test_two_back_ends_train_alike(path, tmp_path, capsys):
    out = tmp_path / "equal"
    code = main(
        [
            "compare",
            "--a",
            str(path),
            "--steps",
            "3",
            "--devices-a",
            "1",
            "--set-b",
            "backend=npu_bridge",
            "--tolerance",
            "1e-5",
            "--out",
            str(out),
        ]
    )
    assert code == 0, capsys.readouterr()
    found = json.loads((out / "compare.json").read_text())
    assert found["passed"] and 0 < found["parameters"] < 1e-4, f"parameters differ by {found['parameters']:.2e}"
    assert "npu_bridge.ops as torch kernels on cpu" in (out / "b.log").read_text()


def test_a_used_folder_and_a_failing_run_are_reported(path, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("")
    assert main(["compare", "--a", str(path), "--out", str(tmp_path / "used")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["compare", "--a", str(path), "--steps", "0", "--out", str(tmp_path / "new")]) == 2
    assert (
        main(
            [
                "compare",
                "--a",
                str(path),
                "--steps",
                "1",
                "--start",
                str(tmp_path / "nowhere"),
                "--devices-a",
                "1",
                "--out",
                str(tmp_path / "failing"),
            ]
        )
        == 2
    )
    message = capsys.readouterr().err
    assert "run a ended with exit code" in message and "no such folder" in message
