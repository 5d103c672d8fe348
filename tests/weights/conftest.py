"""A small Qwen2.5-VL folder in the published layout, and one of each text family."""

import pytest
import torch
import transformers

TEXT = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
VISION = dict(
    depth=2,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    out_hidden_size=32,
    window_size=56,
    fullatt_block_indexes=[1],
    tokens_per_second=2,
)
TOKENS = dict(image_token_id=92, video_token_id=93, vision_start_token_id=90, vision_end_token_id=91)


def qwen2_5_vl(*, tied):
    text = dict(
        TEXT,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]),
        tie_word_embeddings=tied,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=VISION, tie_word_embeddings=tied, **TOKENS)
    )


def qwen3(*, tied):
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT, head_dim=12, tie_word_embeddings=tied))


def qwen2(*, tied):
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT, tie_word_embeddings=tied))


BUILDERS = {"qwen2.5-vl": qwen2_5_vl, "qwen3": qwen3, "qwen2.5": qwen2}


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """published(family, tied, dtype, sharded) -> folder written by transformers."""
    made = {}

    def write(family="qwen2.5-vl", tied=False, dtype="float32", sharded=False):
        key = (family, tied, dtype, sharded)
        if key not in made:
            torch.manual_seed(3)
            model = BUILDERS[family](tied=tied).to(getattr(torch, dtype))
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
            made[key] = tmp_path_factory.mktemp("published")
            model.save_pretrained(made[key], **(dict(max_shard_size="20KB") if sharded else {}))
        return made[key]

    return write


SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A byte-level BPE with a few merges and Qwen's control tokens: 256 bytes, 3 merges, 7 control tokens."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "a")]
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    raw.save(str(path))
    return path


@pytest.fixture(scope="session")
def speaking(tmp_path_factory, tokenizer_file):
    """speaking(family) -> a folder whose model and tokenizer belong together, written by transformers."""
    from mindvl_jax.data.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(tokenizer_file)
    ids = {
        key: tokenizer.token_id(token)
        for key, token in dict(
            image_token_id="<|image_pad|>",
            video_token_id="<|video_pad|>",
            vision_start_token_id="<|vision_start|>",
            vision_end_token_id="<|vision_end|>",
        ).items()
    }
    made = {}

    def write(family):
        if family not in made:
            torch.manual_seed(5)
            vocabulary = dict(TEXT, vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
            if family == "qwen2.5-vl":
                text = dict(
                    vocabulary, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
                )
                model = transformers.Qwen2_5_VLForConditionalGeneration(
                    transformers.Qwen2_5_VLConfig(
                        text_config=text, vision_config=VISION, tie_word_embeddings=False, **ids
                    )
                )
            else:
                model = transformers.Qwen3ForCausalLM(
                    transformers.Qwen3Config(**vocabulary, head_dim=16, tie_word_embeddings=False)
                )
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
            made[family] = tmp_path_factory.mktemp("speaking")
            model.save_pretrained(made[family])
            (made[family] / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
        return made[family]

    return write
