"""Several adapters beside one model: each answers under its name as the model with it alone would."""

import concurrent.futures
from pathlib import Path

import httpx
import numpy as np
import pytest

from mindvl_jax.config.adapters import AdaptersConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.inference import Generator, Request, Sampling
from mindvl_jax.inference.loading import named_adapters, with_adapters
from mindvl_jax.inference.server.sizes import prompt_sizes
from mindvl_jax.models.adapters import is_adapter
from mindvl_jax.models.outline import outline_of
from mindvl_jax.weights.adapter_layout import layout_of
from mindvl_jax.weights.adapters import write_adapter
from mindvl_jax.weights.resolve import OpenedModel

SETTINGS = AdaptersConfig(targets=("language/layers/attention/*",), rank=2, alpha=8)
NAMES = ("one", "two")  # equal targets and ranks: their programs are compiled once
QUESTIONS = ["red", "what is it", "a b c", "yes no"]


@pytest.fixture(scope="module")
def folders(opened, tmp_path_factory):
    found = {}
    for seed, name in enumerate(NAMES):
        config = opened.model.config
        rng = np.random.default_rng(seed)
        values = {
            path: rng.normal(size=like.shape).astype(np.float32) * 0.3
            for path, like in outline_of(config, SETTINGS).shapes.items()
            if is_adapter(path)
        }
        folder = tmp_path_factory.mktemp(name)
        write_adapter(folder, config, layout_of(SETTINGS, config), values)
        found[name] = str(folder)
    return found


def test_each_model_name_answers_as_that_adapter_alone(opened, folders, start):
    pixels = dict(min_pixels=opened.min_pixels, max_pixels=opened.max_pixels)
    opened = OpenedModel(opened.model, opened.model.config, opened.tokenizer, **pixels, folder=Path())
    models = {None: opened, **with_adapters(opened, folders)}
    expected = {}
    for name, each in models.items():
        requests = [Request.from_prompt(text, sampling=Sampling(max_new_tokens=8)) for text in QUESTIONS]
        expected[name] = [answer.text for answer in Generator(each, slots=4, context=64).generate(requests)]
    assert expected[None] != expected["one"] != expected["two"] != expected[None], "the adapters do nothing"
    adapters = {name: models[name] for name in folders}
    sizes = prompt_sizes(context=64, patches=0, images=0, rows=1)
    with start(opened, context=64, sizes=sizes, adapters=adapters) as server:
        cards = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert [(card["id"], card.get("parent")) for card in cards] == [
            ("tiny", None), ("one", "tiny"), ("two", "tiny"),
        ]  # fmt: skip

        def ask(name, text):
            body = {"model": name or "tiny", "max_tokens": 8, "temperature": 0,
                    "messages": [{"role": "user", "content": text}]}  # fmt: skip
            done = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
            return done["choices"][0]["message"]["content"]

        asked = [(name, number) for number in range(len(QUESTIONS)) for name in models]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            told = list(pool.map(lambda each: ask(each[0], QUESTIONS[each[1]]), asked))
        assert told == [expected[name][number] for name, number in asked]
        assert server.runner.metrics.compilations_since_warm_up() == 0
        unknown = httpx.post(f"{server.url}/v1/completions", json={"model": "three", "prompt": "a"})
        assert unknown.status_code == 404 and "'tiny', 'one', 'two'" in unknown.json()["error"]["message"]
        reload = httpx.post(f"{server.url}/admin/reload", json={"weights": "x"})
        assert reload.status_code == 400
        assert server.idle()


@pytest.mark.parametrize(
    ("values", "message"),
    [(["a=x", "a=y"], "the name is there twice"), (["x", "b=y"], "x has no name"), (["=x"], "no name before =")],
)
def test_adapters_without_a_name_of_their_own_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        named_adapters(values)
