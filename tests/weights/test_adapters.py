"""Adapters against the `peft` package over transformers' Qwen2.5-VL: files, logits, gradients, merging, refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from mindvl_jax.cli.main import main
from mindvl_jax.config import families
from mindvl_jax.config.adapters import AdaptersConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.models.adapters import is_adapter
from mindvl_jax.weights.adapter_layout import layout_of
from mindvl_jax.weights.adapters import CONFIG, WEIGHTS, read_adapter, require_layout, write_adapter
from mindvl_jax.weights.mapping import read_config
from mindvl_jax.weights.merge import probe
from mindvl_jax.weights.resolve import add_adapter, open_model

KINDS = {
    "lora": dict(r=4, lora_alpha=12, target_modules=["q_proj", "o_proj", "down_proj"]),
    "rslora": dict(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj", "mlp.0"]),
    "dora": dict(r=3, lora_alpha=6, use_dora=True, target_modules=["k_proj", "gate_proj", "up_proj", "mlp.2"]),
    "fused": dict(
        r=4,
        lora_alpha=12,
        target_modules=["qkv", "attn.proj", "q_proj"],
        rank_pattern={"qkv": 2},
        alpha_pattern={"qkv": 5},
    ),
    "fused-dora": dict(r=4, lora_alpha=8, use_dora=True, use_rslora=True, target_modules=["qkv", "down_proj"]),
}


@pytest.fixture(scope="module")
def adapted(published, tmp_path_factory):
    """adapted(kind) -> (base folder, adapter folder, the PEFT model), every adapter parameter random."""
    made = {}

    def build(kind):
        if kind not in made:
            base, folder = published(), tmp_path_factory.mktemp(kind)
            torch.manual_seed(len(made))
            model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
                base, attn_implementation="eager"
            ).eval()
            model = peft.get_peft_model(model, peft.LoraConfig(**KINDS[kind]))
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter.data.mul_(torch.rand(parameter.shape) + 0.5)
                elif "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(folder)
            made[kind] = base, folder, model
        return made[kind]

    return build


def batch_of(config):
    return jax.tree.map(jnp.asarray, probe(config))


def peft_logits(model, config, batch):
    """Logits of the probe's row: its image has 4 x 4 patches, whose four merged tokens stand at 2 to 5."""
    ids = torch.tensor(np.array(batch.tokens)).long()
    ids[0, 2:6], ids[0, 1], ids[0, 6] = config.image_token_id, config.vision_start_token_id, config.vision_end_token_id
    pixels = (np.array(batch.patches[0], np.float32) - 120) / 60
    grid = torch.tensor([[1, 4, 4]])
    kinds = (ids == config.image_token_id).int()
    positions = model.base_model.model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)[0]
    out = model(input_ids=ids, pixel_values=torch.tensor(pixels), image_grid_thw=grid, mm_token_type_ids=kinds)
    ours = batch.replace(
        tokens=jnp.asarray(ids.numpy(), jnp.int32),
        patches=jnp.asarray(pixels)[None],
        positions=jnp.asarray(positions.numpy().swapaxes(0, 1), jnp.int32),
    )
    return out.logits[0], ours


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_a_peft_folder_are_those_of_peft(adapted, kind):
    base, folder, reference = adapted(kind)
    opened = add_adapter(open_model(base), folder)
    with torch.no_grad():
        expected, batch = peft_logits(reference, opened.model_config, batch_of(opened.model_config))
    with jax.default_matmul_precision("highest"):
        graph, state = nnx.split(opened.model, nnx.Param)
        found = np.asarray(jax.jit(lambda state: (model := nnx.merge(graph, state)).logits(model(batch)))(state)[0])
    error = np.max(np.abs(found - expected.numpy())) / np.max(np.abs(expected.numpy()))
    assert error < 1e-5, f"{kind}: relative difference {error:.2e}"
    with reference.disable_adapter(), torch.no_grad():
        without = peft_logits(reference, opened.model_config, batch)[0]
    assert np.max(np.abs((without - expected).numpy())) > 1e-2, "the adapter does nothing: the test could not fail"


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_folder_comes_back_in_equal_bytes(adapted, kind, tmp_path):
    base, folder, _ = adapted(kind)
    config = read_config(base)
    adapter = read_adapter(folder, config)
    write_adapter(tmp_path, config, adapter.layout, adapter.parameters, like=adapter)
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("kind", ["lora", "fused-dora"])
def test_a_folder_written_without_an_original_opens_in_peft_with_equal_tensors(adapted, kind, tmp_path):
    base, folder, reference = adapted(kind)
    config = read_config(base)
    adapter = read_adapter(folder, config)
    write_adapter(tmp_path, config, adapter.layout, adapter.parameters, base=str(base))
    assert load_file(tmp_path / WEIGHTS).keys() == load_file(folder / WEIGHTS).keys()
    again = peft.PeftModel.from_pretrained(
        transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(base, attn_implementation="eager"), tmp_path
    )
    ours, theirs = (peft.get_peft_model_state_dict(model) for model in (again, reference))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert (again.peft_config["default"].r, again.peft_config["default"].lora_alpha) == (
        KINDS[kind]["r"],
        KINDS[kind]["lora_alpha"],
    )


def test_parts_of_a_fused_matrix_are_written_as_one_adapter_of_equal_effect(published, tmp_path):
    """Query and value of the vision tower, each with its own A, become one block-diagonal adapter of `qkv` in PEFT."""
    base = published()
    opened = open_model(base)
    layout = layout_of(
        AdaptersConfig(
            targets=("vision/blocks/attention/query", "vision/blocks/attention/value"), rank=3, alpha=6, rslora=True
        ),
        opened.model_config,
    )
    rng = np.random.default_rng(0)
    parameters = {
        f"{path}/{leaf}": rng.normal(size=shape).astype(np.float32) * 0.3
        for path in layout
        for leaf, shape in (("lora_a", (2, 16, 3)), ("lora_b", (2, 3, 16)))
    }
    write_adapter(tmp_path, opened.model_config, layout, parameters)
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert (settings["r"], settings["target_modules"]) == (6, ["qkv"])
    reference = peft.PeftModel.from_pretrained(
        transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(base), tmp_path
    )
    weight = reference.merge_and_unload().model.visual.blocks[1].attn.qkv.weight.detach().numpy()
    kernels = opened.parameters()
    for start, part in ((0, "query"), (16, "key"), (32, "value")):
        path = f"vision/blocks/attention/{part}"
        expected = np.array(kernels[f"{path}/kernel"][1])
        if path in layout:
            expected = expected + layout[path].scale * parameters[f"{path}/lora_a"][1] @ parameters[f"{path}/lora_b"][1]
        np.testing.assert_allclose(weight[start : start + 16].T, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "fused-dora"])
def test_gradients_are_those_of_peft(adapted, kind):
    base, folder, reference = adapted(kind)
    opened = add_adapter(open_model(base), folder)
    config = opened.model_config
    reference.zero_grad()
    logits, batch = peft_logits(reference, config, batch_of(config))
    targets = np.random.default_rng(1).integers(0, 90, 24)
    torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum").backward()
    graph, state = nnx.split(opened.model, nnx.Param)

    def loss(state):
        model = nnx.merge(graph, state)
        return -jnp.sum(jax.nn.log_softmax(model.logits(model(batch))[0])[jnp.arange(24), targets])

    with jax.default_matmul_precision("highest"):
        gradients = jax.jit(jax.grad(loss))(state)
    found = {
        "/".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(gradients)
    }
    found = {path: value for path, value in found.items() if is_adapter(path)}
    # PEFT's gradients, brought into our layout by the reader that the logits have already proved.
    theirs = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    shown = folder.parent / f"{kind}-gradients"
    shown.mkdir()
    save_file(
        {name.replace("_vector.weight", "_vector"): value.numpy() for name, value in theirs.items()}, shown / WEIGHTS
    )
    (shown / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    expected = read_adapter(shown, config).parameters
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        error = np.max(np.abs(found[path] - value)) / np.max(np.abs(value))
        assert error < 1e-4, f"{path}: relative difference {error:.2e}"


@pytest.mark.parametrize("kind", ["rslora", "fused-dora"])
def test_merge_writes_what_peft_merges_and_checks_the_logits(adapted, kind, tmp_path, capsys):
    base, folder, _ = adapted(kind)
    assert main(["merge", "--base", str(base), "--adapter", str(folder), "--out", str(tmp_path / "merged")]) == 0
    assert "differ by at most" in capsys.readouterr().out
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(base)
    expected = peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    found = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "merged").state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6)
    assert any(not torch.equal(found[name], value) for name, value in open_base(base).items())


def open_base(base):
    return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(base).state_dict()


def test_what_does_not_fit_is_refused_before_any_work(adapted, tmp_path):
    base, folder, _ = adapted("lora")
    config = read_config(base)
    tensors, settings = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())

    def write(changed_tensors=tensors, **changed):
        save_file(changed_tensors, tmp_path / WEIGHTS)
        (tmp_path / CONFIG).write_text(json.dumps(settings | changed))
        return tmp_path

    first = next(name for name in tensors if "layers.0.self_attn.q_proj.lora_A" in name)
    cases = [
        (write, dict(r=8), "expected .* for rank 8"),
        (write, dict(use_dora=True), "lora_magnitude_vector is missing"),
        (write, dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (write, dict(lora_alpha=None), "scale is unknown"),
        (
            lambda: write(tensors | {"base_model.model.model.other.lora_A.weight": np.zeros((4, 4), np.float32)}),
            {},
            "belong to no adapter .*other.lora_A",
        ),
        (
            lambda: write({name: value for name, value in tensors.items() if name != first}),
            {},
            "q_proj.lora_A is missing",
        ),
        (
            lambda: write({name: value for name, value in tensors.items() if ".layers.0." not in name}),
            {},
            "1 of 2 layers",
        ),
    ]
    for build, changes, message in cases:
        with pytest.raises(UserError, match=message):
            read_adapter(build(**changes), config)
    wanted = layout_of(AdaptersConfig(targets=("q_proj", "o_proj", "down_proj"), rank=8, alpha=12), config)
    with pytest.raises(UserError, match="rank 4 there, 8 in the configuration"):
        require_layout(read_adapter(folder, config).layout, wanted, folder)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(targets=["q_prj"]), "'q_prj' selects no linear layer; did you mean 'q_proj'"),
        (dict(targets=["language/layers/attention/quary"]), "did you mean 'language/layers/attention/query'"),
        (dict(targets=["proj"]), r"selects visual.patch_embed.proj .*name 'attn.proj' instead"),
        (dict(targets=["lm_head"]), "selects lm_head"),
        (dict(targets=["q_proj"], ranks={"v_proj": 4}), "adapters.ranks: 'v_proj' selects none of the targeted"),
        (
            dict(targets=["qkv", "vision/blocks/attention/query"]),
            "once with an A of its own and once with a shared one",
        ),
    ],
)
def test_targets_that_select_nothing_or_too_much_are_refused(published, section, message):
    with pytest.raises(UserError, match=message):
        layout_of(AdaptersConfig(**section), read_config(published()))


def test_families_whose_layers_were_not_checked_are_refused():
    config = families.preset("mindvl-671b-a37b")
    with pytest.raises(UserError, match="not built for model.family mindvl_moe; they work on mindvl, "):
        layout_of(AdaptersConfig(targets=("q_proj",)), config)


def test_experts_take_neither_dora_nor_four_bits_and_all_linear_leaves_them_out():
    config = families.preset("qwen3-30b-a3b")
    assert not any("experts" in path for path in layout_of(AdaptersConfig(targets=("all-linear",)), config))
    for section, message in (
        (dict(targets=("down_proj",), dora=True), "adapters.dora: not built for experts"),
        (dict(targets=("q_proj",), base="nf4"), "nf4 does not hold experts, most of this model"),
        (dict(targets=("gate",)), "a convolution, a router or the output"),
    ):
        with pytest.raises(UserError, match=message):
            layout_of(AdaptersConfig(**section), config)
