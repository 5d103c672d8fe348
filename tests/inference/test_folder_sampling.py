"""Settings of a published generation_config.json are used on request and reported otherwise."""

import json
import math

import pytest

from mindvl_jax.core.errors import UserError
from mindvl_jax.inference.folder_sampling import folder_sampling, sampling_for

PUBLISHED = {  # as Qwen2.5-VL-7B-Instruct has it
    "bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05, "temperature": 0.000001, "transformers_version": "4.49.0",
}  # fmt: skip

FULL = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1}


def write(folder, content) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text)


@pytest.mark.parametrize(
    ("content", "settings", "not_built"),
    [
        (PUBLISHED, {"repetition_penalty": 1.05, "temperature": 0.000001}, ()),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.8}, {}, ()),
        ({"temperature": 0.7, "top_k": 20}, {}, ()),  # transformers ignores them without do_sample
        ({"do_sample": True}, {"temperature": 1.0}, ()),
        ({"do_sample": True, **FULL}, FULL, ()),
        ({"do_sample": True, "top_k": None, "temperature": 0.6}, {"temperature": 0.6}, ()),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}, ()),
        ({"num_beams": 4, "no_repeat_ngram_size": 3}, {}, ("num_beams", "no_repeat_ngram_size")),
        ({"suppress_tokens": [1]}, {}, ("suppress_tokens",)),
        ({"num_beams": 1, "length_penalty": 1.0, "suppress_tokens": [], "typical_p": 1.0}, {}, ()),
        ({}, {}, ()),
    ],
)  # fmt: skip
def test_the_settings_of_a_folder(tmp_path, content, settings, not_built):
    write(tmp_path, content)
    found = folder_sampling(tmp_path)
    assert (found.settings, found.not_built) == (settings, not_built)
    lines = []
    assert sampling_for(tmp_path, "greedy", {}, lines.append) == {}
    assert bool(lines) == bool(settings or not_built) and all(name in lines[0] for name in (*settings, *not_built))
    if not_built:
        with pytest.raises(UserError, match="not built"):
            sampling_for(tmp_path, "folder", {}, lines.append)
    else:
        assert sampling_for(tmp_path, "folder", {"top_p": 0.5}, lines.append) == {**settings, "top_p": 0.5}


BAD = (("temperature", "hot"), ("temperature", -1), ("temperature", math.nan), ("temperature", math.inf), ("top_p", 0))


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{", "5", {"repetition_penalty": 0}),
        *({"do_sample": True, name: value} for name, value in (*BAD, ("top_k", True), ("top_p", 7))),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_file(tmp_path, content):
    write(tmp_path, content)
    with pytest.raises(UserError, match="generation_config"):
        folder_sampling(tmp_path)


def test_a_folder_without_the_file_asks_for_nothing(tmp_path):
    assert sampling_for(tmp_path, "folder", {}, print) == {}
