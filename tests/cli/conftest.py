"""A tiny published folder, a byte-level tokenizer and coloured squares for the commands."""

import json

import numpy as np
import pytest
import tokenizers
from flax import nnx
from PIL import Image

from mindvl_jax.cli.main import main
from mindvl_jax.config.schema import TokenizerConfig
from mindvl_jax.data.text.tokenizer import load_tokenizer
from mindvl_jax.models.mindvl.config import MindVLConfig
from mindvl_jax.models.mindvl.model import MindVL
from mindvl_jax.weights.companions import write_companions
from mindvl_jax.weights.save import save_parameters

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220)}
MODEL = {
    "vision": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "window_size": 56,
        "fullatt_block_indexes": [0, 1],
        "tokens_per_second": 3,
    },
    "text": {
        "family": "qwen2",
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rope_theta": 5e4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope": "mrope",
        "mrope_section": [2, 3, 3],
        "max_position_embeddings": 4096,
    },
    "image_token_id": 261,
    "video_token_id": 262,
    "vision_start_token_id": 259,
    "vision_end_token_id": 260,
    "compute_dtype": "float32",
}


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A Hugging Face folder of model_type qwen2_5_vl whose settings are no defaults."""
    folder = tmp_path_factory.mktemp("published") / "Tiny-VL"
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    raw = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[])
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    file = folder.parent / "tokenizer.json"
    raw.save(str(file))
    config, tokenizer = MindVLConfig.model_validate(MODEL), load_tokenizer(TokenizerConfig(path=str(file)))
    state = nnx.state(MindVL(config, rngs=nnx.Rngs(0)), nnx.Param)
    parameters = {"/".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}
    save_parameters(folder, config, parameters, pad_token_id=tokenizer.pad_id, eos_token_id=tokenizer.eos_id)
    write_companions(folder, config, tokenizer, 784, 3136)
    return folder


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """Images of one colour and a LLaVA file that asks for it."""
    folder = tmp_path_factory.mktemp("squares")
    rng, records = np.random.default_rng(0), []
    for index in range(24):
        name = list(COLOURS)[index % 3]
        pixels = np.clip(np.array(COLOURS[name]) + rng.integers(-10, 10, (56, 56, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        records.append(
            {
                "id": str(index),
                "image": f"{index}.png",
                "conversations": [{"from": "human", "value": "<image>Colour?"}, {"from": "gpt", "value": name}],
            }
        )
    (folder / "squares.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def mindvl(capsys):
    """`mindvl("train", ...)` -> (exit code, standard output, standard error)."""

    def call(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
        told = capsys.readouterr()
        return code, told.out, told.err

    return call
