"""A tiny model, a byte-level tokenizer and coloured squares: a whole run takes seconds, and equal runs of a session
share what they compiled.
"""

import copy
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from PIL import Image

from mindvl_jax.config import loader as config_loader
from mindvl_jax.training import trainer
from mindvl_jax.training.step import program_key
from mindvl_jax.training.xla_backend import Xla

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220), "white": (245, 245, 245)}


def write_tokenizer(folder):
    """Every byte is a token; ids 0-255, then the special ones in order."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    raw = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[])
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    raw.save(str(folder / "tokenizer.json"))


def write_data(folder, count=48, seed=0, source="squares"):
    """Squares of four colours with the colour as answer; every fourth sample is text only."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        name = list(COLOURS)[rng.integers(len(COLOURS))]
        pixels = np.clip(
            np.array(COLOURS[name])
            + rng.integers(-10, 10, (28 * int(rng.integers(1, 3)), 28 * int(rng.integers(1, 3)), 3)),
            0,
            255,
        )
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        text_only = index % 4 == 3
        question = f"Say {name}." if text_only else "<image>Colour?"
        rows.append(
            {
                "id": f"{source}-{index}",
                "images": [] if text_only else [{"bytes": file.getvalue(), "path": ""}],
                "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": name}],
                "answers": [name],
            }
        )
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("images", pa.list_(image)),
            ("messages", pa.list_(message)),
            ("answers", pa.list_(pa.string())),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{source}.parquet")


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    write_tokenizer(folder)
    write_data(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def equal_runs_trace_and_compile_once():
    """Tests train the same tiny model again and again; two thirds of each run would be tracing and compiling the same
    step.

    Only what runs one after another in this process shares programs; the processes that tests start compile for
    themselves.
    """
    make, outline_of, programs, outlines = trainer.make_programs, trainer.outline_of, {}, {}

    def shared_outline(config, adapters=None):
        key = config.model_dump_json(), adapters and adapters.model_dump_json()
        if key not in outlines:
            outlines[key] = outline_of(config, adapters)
        return outlines[key]

    def shared_programs(outline, *, compile, **options):
        backend = compile.func.__self__
        if not isinstance(backend, Xla):
            return make(outline, compile=compile, **options)
        key = (
            id(outline),
            program_key(options["phase"], options["objective"], options["spec"], options["trained"]),
            tuple(options["frozen"]),
            options["mesh"],
            options["seed"] if options["objective"].uses_key else None,
            options["optimizer"].model_dump_json(),
            backend._config.parallel.model_dump_json(),
        )
        if key not in programs:
            programs[key] = make(outline, compile=compile, **options)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_programs", shared_programs)
        patch.setattr(trainer, "outline_of", shared_outline)
        yield


PHASE = {
    "steps": 3,
    "mixture": [{"source": "squares"}],
    "rows": 4,
    "sequence_length": 96,
    "patches_per_row": 64,
    "max_samples_per_row": 8,
    "min_pixels": 784,
    "max_pixels": 784 * 4,
    "learning_rate": 3e-3,
    "schedule": "constant",
}


def configuration(assets, run_dir, *phases, **sections):
    """A whole configuration as plain data, for the files that `write_tokenizer` and `write_data` put into `assets`."""
    mapping = {
        "run": {"dir": str(run_dir), "seed": 3},
        "model": {
            "vision": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "window_size": 56,
                "fullatt_block_indexes": [0, 1],
            },
            "text": {
                "family": "qwen3",
                "vocab_size": 264,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_layers": 2,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 16,
                "rope_theta": 1e4,
                "tie_word_embeddings": True,
                "rope": "mrope",
                "mrope_section": [2, 3, 3],
            },
            "image_token_id": 261,
            "video_token_id": 262,
            "vision_start_token_id": 259,
            "vision_end_token_id": 260,
            "compute_dtype": "float32",
        },
        "tokenizer": {"path": str(assets / "tokenizer.json")},
        "data": {
            "sources": {"squares": {"path": str(assets / "squares.parquet")}},
            "packing_buffer": 8,
            "prefetch": 2,
            "cache_examples": True,
        },
        "training": {
            "phases": [{**PHASE, "name": f"phase{index}", **phase} for index, phase in enumerate(phases or ({},))]
        },
        "logging": {"tensorboard": False},
        "mesh": {"data": 1},  # one of the eight devices that tests have
    }
    for section, changes in sections.items():
        merge(mapping.setdefault(section, {}), changes)
    return copy.deepcopy(mapping)


@pytest.fixture
def run_mapping(assets, tmp_path):
    """A whole configuration as plain data: tests change it and validate it."""
    return lambda *phases, name="run", **sections: configuration(assets, tmp_path / name, *phases, **sections)


def merge(target, changes):
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            merge(target[key], value)
        else:
            target[key] = value


@pytest.fixture
def run_config(run_mapping):
    """`run_config({phase changes}, {...}, name=folder, section={changes})` -> Config."""
    return lambda *phases, **options: config_loader.from_mapping(run_mapping(*phases, **options))


@pytest.fixture
def read_metrics():
    def read(config):
        with open(f"{config.run.dir}/metrics.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    return read
