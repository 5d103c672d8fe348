"""Configurations that nobody means, or that are meant to harm: each is refused at once, by its place, without a
traceback.
"""

from __future__ import annotations

import os
import time

import pytest

from mindvl_jax.config import loader
from mindvl_jax.config.loader import ConfigError
from tests.config.test_config_loader import MINIMAL

PHASE = "training.phases[0]"
REFUSED = [
    # numbers that no training can mean
    *(
        f"training.optimizer.{setting}"
        for setting in (
            "b1=1.0",
            "b1=1.5",
            "b1=-0.5",
            "b1=.nan",
            "b2=1.0",
            "b2=0.99999999",
            "b2=.inf",
            "eps=0",
            "eps=-1",
            "eps=.nan",
            "eps=1e-60",
            "clip_norm=-1",
            "clip_norm=.nan",
            "clip_norm=.inf",
        )
    ),
    *(
        f"{PHASE}.{setting}"
        for setting in (
            "learning_rate=.inf",
            "learning_rate=-1",
            "learning_rate=.nan",
            "learning_rate=1e300",
            "learning_rate=true",
            "weight_decay=.inf",
            "weight_decay=-1",
            "mixture[0].weight=.inf",
            "mixture[0].weight=0",
            "mixture[0].weight=1e-300",
            "final_learning_rate_fraction=2",
            "final_learning_rate_fraction=.nan",
            "warmup_steps=11",
            "warmup_ratio=2",
            "steps=0",
            "steps=true",
            "steps=1.5",
            "steps=1e12",
            "steps=10000000000000000",
            "rows=0",
            "rows=true",
            "rows=99999999999",
            "sequence_length=1e15",
            "sequence_length=-1",
            "patches_per_row=99999999999",
            "gradient_accumulation=1e12",
            "min_pixels=0",
            "min_pixels=2000000",
            "max_pixels=99999999999999",
            "epochs=.inf",
            "learning_rate_multipliers={'**': .inf}",
            "learning_rate_multipliers={'**': true}",
            "train=[]",
            "mixture=[]",
        )
    ),
    "training.phases=[]",
    "training.ema_decay=1.0",
    "training.ema_decay=0.99999999",
    "training.ema_decay=.nan",
    "training.loss_chunk=1e18",
    "training.max_bad_steps=0",
    "run.seed=-1",
    "run.seed=99999999999999999999",
    "run.seed=true",
    "run.seed=1.5",
    "data.video_fps=.inf",
    "data.video_fps=0",
    "data.video_fps=1e9",
    "data.max_error_rate=.nan",
    "data.max_error_rate=2",
    "data.workers=1000000",
    "data.workers=-1",
    "data.workers=true",
    "data.prefetch=1000000000",
    "data.packing_buffer=1000000000000",
    "data.sources={}",
    "checkpoint.keep=0",
    "checkpoint.every_steps=0",
    "checkpoint.every_steps=true",
    "logging.peak_flops=.inf",
    "mesh.data=0",
    "mesh.data=-2",
    "mesh={data: -1, fsdp: -1}",
    "profile.steps=[5, 2]",
    "profile.steps=[true, 2]",
    "evaluation={min_pixels: 100, max_pixels: 10}",
    "evaluation.batch=0",
    "distributed={coordinator: 'a:1', processes: 2, process_id: 2}",
    # sizes that cannot go together, or have no bound
    *(
        f"model.vision.{setting}"
        for setting in (
            "window_size=1",
            "num_heads=3",
            "fullatt_block_indexes=[99]",
            "fullatt_block_indexes=[-1]",
            "fullatt_block_indexes=5",
            "depth=0",
            "depth=100000000",
            "hidden_size=1e15",
            "patch_size=0",
            "rope_theta=.inf",
            "rms_norm_eps=.nan",
            "num_heads=16",
        )
    ),
    *(
        f"model.text.{setting}"
        for setting in (
            "rope_theta=.inf",
            "rope_theta=0",
            "rms_norm_eps=-1",
            "vocab_size=99999999999",
            "num_layers=true",
            "mrope_section=[2, 3]",
            "mrope_section=[true, 3, 3]",
            "hidden_size=100000000000",
        )
    ),
    "model.text={head_dim: 15, rope: 1d}",
    "model.image_token_id=-1",
    "model.image_token_id=64",
    "model.video_token_id=true",
    # names and paths
    *(
        f"{PHASE}.name={name}"
        for name in (
            "''",
            "'../../x'",
            "/etc/x",
            "'[/x]'",
            "'a/b'",
            "'.hidden'",
            "'a\\\\b'",
            '"a\\0b"',
            '"\\e[31mred"',
            "'=1+1'",
            "'-x'",
            "'@x'",
            f"'{'n' * 300}'",
            "'ends.'",
            "' a'",
            "true",
            "[a]",
            '"a\\nb"',
            "'+cmd|calc'",
        )
    ),
    "training.phases=[{name: A, steps: 1, mixture: [{source: words}], rows: 1, sequence_length: 8, "
    "patches_per_row: 4, learning_rate: 1}, {name: a, steps: 1, mixture: [{source: words}], rows: 1, "
    "sequence_length: 8, patches_per_row: 4, learning_rate: 1}]",
    "evaluation.tasks=[{name: '../../../ESCAPED', source: {path: x}}]",
    "evaluation.tasks=[{name: t, source: {path: x}}, {name: t, source: {path: y}}]",
    "data.sources={'../x': {path: a}}",
    "run.dir=''",
    "run.dir=' '",
    'run.dir="a\\0b"',
    f"run.dir={'x' * 300}",
    f"run.dir={'x/' * 3000}",
    'run.dir="a\\e[2Jb"',
    "run.dir=5",
    'data.sources.words.path="\\0"',
    # not the shape of a configuration
    "run=5",
    "run=[]",
    "model=null",
    "training.phases=5",
    "training.phases={}",
    "data.sources=[]",
    "run.seed={}",
    "a.b.c=1",
    "=5",
    "nonsense",
    "training.phases[99999999999999999999].steps=1",
    "run.seed=[",
    "run.seed=!!python/object/apply:os.system ['true']",
    f"run.seed={'9' * 5000}",
    f"run.dir={'[' * 5000}",
    "run.seed=&a [*a]",
    "training.phases[0].steps=2001-99-99",
    "run.? [a, b]=1",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "config.yaml"
    path.write_text(MINIMAL)
    return path


def test_the_base_itself_is_accepted(base):
    loader.load(base)


@pytest.mark.parametrize("setting", REFUSED, ids=lambda setting: setting[:60].encode("ascii", "replace").decode())
def test_a_setting_is_refused_in_a_short_message(base, setting):
    with pytest.raises(ConfigError) as error:
        loader.load(base, [setting])
    assert len(str(error.value)) < 6000


BOMB = "\n".join(
    [
        "a: &a [x,x,x,x,x,x,x,x,x]",
        *(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]" for i in range(8)),
    ]
)
FILES = {
    "aliases that multiply": BOMB,
    "an alias that holds itself": "run: &a [*a]",
    "a mapping that holds itself": "run: &a {b: *a}",
    "deep brackets": "run: " + "[" * 20000 + "]" * 20000,
    "deep braces": "{a: " * 20000,
    "a long number": f"run: {{seed: {'9' * 5000}}}",
    "no text": b"\xff\x00\xfe",
    "another tag": "run: !!python/object/apply:os.system ['true']",
    "a list as key": "? [a, b]\n: 1\n",
    "a number as key": "1: 2\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "an anchor that is not there": "run: *nowhere",
    "a tab": "run:\n\tdir: x\n",
    "a null byte": "run: {dir: \0}",
    "only comments": "# nothing\n",
    "wide": "".join(f"k{i}: 1\n" for i in range(30_000)),
    "extends itself": "extends: c.yaml\n",
    "extends a folder": "extends: .\n",
    "extends a number": "extends: 5\n",
    "extends a mapping": "extends: {a: b}\n",
    "extends a name with a null": 'extends: "a\\0b"\n',
    "extends a name too long": f"extends: {'n' * 5000}\n",
    "extends a device": "extends: /dev/zero\n",
    "merge of a list": "a: &a [1]\nrun:\n  <<: *a\n",
    "an impossible date": "run: {dir: 2001-02-31}",
    "sexagesimal": "run: {seed: 9999999:59:59}",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_refused_in_bounded_time(tmp_path, name):
    content = FILES[name]
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.monotonic()
    with pytest.raises(ConfigError) as error:
        loader.load(path)
    assert time.monotonic() - start < 20 and len(str(error.value)) < 6_000_000


def test_files_that_extend_two_each_do_not_double_for_ever(tmp_path):
    for floor in range(30):
        (tmp_path / f"{floor}.yaml").write_text(f"extends: [{floor + 1}.yaml, {floor + 1}.yaml]\n")
    (tmp_path / "30.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match="more than"):
        loader.load(tmp_path / "0.yaml")


def test_a_pipe_is_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe"):
        loader.load(tmp_path / "pipe")


def test_a_byte_order_mark_before_a_configuration_is_no_part_of_it(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    (tmp_path / "d.yaml").write_bytes(MINIMAL.encode("utf-16"))
    assert loader.load(tmp_path / "c.yaml") == loader.load(tmp_path / "d.yaml")
