"""Shared by the tests of families: a model of transformers whose parameters are all random, and ours on its files.

Norms are away from one and biases away from zero, so that none can be forgotten unseen.
"""

import dataclasses
import functools
import importlib.util
import json
import types
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file

import npu_bridge
from mindvl_jax.cli.main import main
from mindvl_jax.models.hf import ConfigReader
from mindvl_jax.models.outline import outline_of
from mindvl_jax.models.registry import spec_of
from mindvl_jax.parity.check import mean_kl
from mindvl_jax.parity.reference import load_reference
from mindvl_jax.parity.samples import pack, random_sample, reference_inputs
from mindvl_jax.weights import load_parameters, open_model, save_parameters
from mindvl_jax.weights.adapters import CONFIG, WEIGHTS, read_adapter, write_adapter
from mindvl_jax.weights.companions import write_companions
from mindvl_jax.weights.mapping import read_config, slots
from mindvl_jax.weights.resolve import add_adapter
from npu_bridge import ops

ROOT = Path(__file__).parents[2]


def publish(model: torch.nn.Module, folder: Path, seed: int = 0) -> Path:
    """A folder that transformers writes after every parameter was drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = name.endswith("weight") and parameter.ndim == 1
        fan_in = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]
        gain = 1.3 / fan_in**0.5 if parameter.ndim > 1 else 0.1
        parameter.data = 1 + 0.1 * noise if is_norm else noise * gain
    model.save_pretrained(folder)
    return folder


def opened(folder: Path) -> types.SimpleNamespace:
    config = read_config(folder).model_copy(update=dict(compute_dtype="float32"))
    return types.SimpleNamespace(
        folder=folder, config=config, reference=load_reference(folder), parameters=load_parameters(folder, config)
    )


@dataclasses.dataclass
class Compared:
    """Logits of each sample alone in the reference and at its place in our packed rows, our gradients, our program."""

    theirs: list[np.ndarray]
    ours: list[np.ndarray]
    grads: dict[str, np.ndarray]
    run: Callable
    compiled: Callable
    batch: object

    def check_logits(self) -> None:
        assert min(want.std() for want in self.theirs) > 0.1, "the reference logits hardly vary: this proves nothing"
        worst = max(float(np.abs(one - want).max()) for one, want in zip(self.ours, self.theirs, strict=True))
        kl = max(mean_kl(one, want) for one, want in zip(self.ours, self.theirs, strict=True))
        assert worst < 1e-4, f"largest logit difference {worst:.2e}"
        assert kl < 1e-6, f"mean KL {kl:.2e}"

    def check_gradients(self, made, name_of=lambda name: name, never: tuple[str, ...] = (), zero: str = "") -> None:
        """Every parameter's, relative L2.

        Args:
          name_of: published name -> name of the reference's parameter. never: published names of tensors that no
            logit depends on. zero: path of ours whose gradient is zero by formula (a bias of keys that nothing turns
            adds the same to all scores of a query), so that both sides hold rounding alone.
        """
        theirs, seen, worst = dict(made.reference.named_parameters()), set(), ("", 0.0)
        for slot in slots(made.config, {path: value.shape for path, value in self.grads.items()}):
            seen.update(slot.rule.ours)
            if slot.name in never:
                assert not any(self.grads[path][slot.index].any() for path in slot.rule.ours)
                continue
            want = theirs[name_of(slot.name)].grad.numpy()
            if tuple(want.shape) != slot.shape:  # stacked experts: the files hold them inputs first
                want = want.swapaxes(1, 2)
            for path, part in zip(slot.rule.ours, slot.rule.form.to_ours(want, slot.shapes), strict=True):
                ours = self.grads[path][slot.index]
                if path == zero:
                    most = 1e-5 * np.abs(self.grads[path.replace("bias", "kernel")]).max()
                    assert max(np.abs(ours).max(), np.abs(part).max()) < most, path
                    continue
                relative = float(np.linalg.norm(ours - part) / np.linalg.norm(part))
                worst = max(worst, (f"{path}{list(slot.index)}", relative), key=lambda pair: pair[1])
        assert seen == set(self.grads), f"never compared: {set(self.grads) - seen}"
        assert worst[1] < 1e-4, f"largest relative L2 difference {worst[1]:.2e} in {worst[0]}"

    def check_bridge(self, made, steps: int = 3, rate: float = 0.02) -> None:
        """A few steps of gradient descent, by npu_bridge and by XLA."""

        losses = []
        with jax.default_matmul_precision("highest"):
            for compiled in (self.compiled, npu_bridge.jit(self.run, device="cpu")):
                params, row = {path: np.asarray(value) for path, value in made.parameters.items()}, []
                for _ in range(steps):
                    (loss, _), grads = compiled(params, self.batch)
                    params = {path: value - rate * np.asarray(grads[path]) for path, value in params.items()}
                    row.append(float(np.asarray(loss)))
                losses.append(row)
        assert losses[0][0] > 1.01 * losses[0][-1], f"nothing was learned: {losses[0]}"
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def compare(made, shapes, rows, *, tokens: int, patches: int, longest: int = 80, largest: int = 80) -> Compared:
    """Samples of these shapes alone in the reference, and packed in rows (numbers of samples) in ours."""
    draw = functools.partial(random_sample, made.config, np.random.default_rng(7))
    samples = [draw(*shape) for shape in shapes]
    theirs = []
    for sample in samples:
        out = made.reference(**reference_inputs(sample, made.config))
        nll = torch.nn.functional.cross_entropy(out.logits[0, :-1], torch.tensor(sample.tokens[1:]), reduction="none")
        (nll * torch.tensor(sample.learned[1:]).float()).sum().backward()
        theirs.append(out.logits[0].detach().numpy())
    packed = [[samples[number] for number in row] for row in rows]
    batch = jax.tree.map(jnp.asarray, pack(packed, made.config, made.reference, tokens=tokens, patches=patches))
    outline = outline_of(made.config)

    def run(params, batch):
        def total(params):
            model = outline.merge(params)
            hidden = model(batch, max_sample_length=longest, max_image_patches=largest)
            loss = ops.cross_entropy(hidden, model.head_kernel(), batch.targets, batch.loss_weights, chunk=64)
            return loss.sum(), model.logits(hidden)

        return jax.value_and_grad(total, has_aux=True)(params)

    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
        (_, logits), grads = compiled(made.parameters, batch)
    ours = [None] * len(samples)
    for b, row in enumerate(rows):
        start = 0
        for number in row:
            length = len(samples[number].tokens)
            ours[number] = np.asarray(logits[b, start : start + length])
            start += length
    return Compared(theirs, ours, jax.device_get(grads), run, compiled, batch)


def check_adapter(made, folder: Path, shape: tuple, targets: list[str]) -> None:
    """A folder that PEFT wrote gives PEFT's logits and comes back with equal bytes."""
    model = peft.get_peft_model(
        load_reference(made.folder), peft.LoraConfig(r=3, lora_alpha=9, target_modules=targets)
    ).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    adapter = read_adapter(folder, made.config)
    write_adapter(folder / "again", made.config, adapter.layout, adapter.parameters, like=adapter)
    for name in (WEIGHTS, CONFIG):
        assert (folder / "again" / name).read_bytes() == (folder / name).read_bytes(), name
    sample = random_sample(made.config, np.random.default_rng(3), *shape)
    with torch.no_grad():
        want = model(**reference_inputs(sample, made.config)).logits[0].numpy()
        with model.disable_adapter():
            without = model(**reference_inputs(sample, made.config)).logits[0].numpy()
    assert np.abs(want - without).max() > 0.1, "the adapter does nothing"
    patches = sum(len(visual.pixels) for visual in sample.visuals)
    batch = pack([[sample]], made.config, made.reference, tokens=len(sample.tokens), patches=patches)
    graph, state = nnx.split(add_adapter(open_model(made.folder), folder).model, nnx.Param)

    @jax.jit
    def logits(state, batch):
        model = nnx.merge(graph, state)
        return model.logits(model(batch))[0]

    with jax.default_matmul_precision("highest"):
        ours = np.asarray(logits(state, jax.tree.map(jnp.asarray, batch)))
    assert np.abs(ours - want).max() < 1e-4 * np.abs(want).max()


def check_refused(made, change: tuple, read: Callable, problem: str) -> None:
    """A config.json with one value changed, (part or None, key, value), is refused with this problem alone."""
    content = json.loads((made.folder / "config.json").read_text())
    part, key, value = change
    (content if part is None else content[part])[key] = value
    reader = ConfigReader()
    read(content, reader)
    assert reader.problems == [problem]


def check_parity_command(folder: Path, out: Path, capsys, *parts: str) -> None:
    """`mindvl parity` finds the same mathematics, and compares these parts by name."""
    assert main(["parity", "--weights", str(folder), "--out", str(out), "--samples", "1", "--text-tokens", "6"]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("same mathematics", *parts)), said


def check_round_trip(folder: Path, out: Path, family: str, *, low: int = 3136, high: int = 100352) -> None:
    """The folder comes back with equal bytes, and transformers opens what we wrote."""
    config = read_config(folder)
    assert spec_of(config).name == family
    save_parameters(out, config, load_parameters(folder, config))
    write_companions(out, config, None, low, high)
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    canonical = {spec_of(config).hf.get().canonical(name): tensor for name, tensor in before.items()}
    assert set(canonical) == set(after)
    for name, tensor in after.items():
        assert torch.equal(tensor, canonical[name]), name
    assert read_config(out) == config
    kind = type(load_reference(folder))
    theirs, again = (kind.from_pretrained(path).state_dict() for path in (folder, out))
    assert all(torch.equal(value, again[name]) for name, value in theirs.items())


@functools.cache
def fixtures():
    """The tokenizer and the pictures of the tests of generation."""
    spec = importlib.util.spec_from_file_location("inference_fixtures", ROOT / "tests" / "inference" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_greedy(generator, requests, reference, inputs_of: Callable, stop: list[int]) -> None:
    """Answers of requests, all together, against transformers' one by one.

    Args:
      inputs_of: (request, its token ids) -> what transformers' `generate` takes.
    """
    answers = generator.generate(requests)
    for request, answer in zip(requests, answers, strict=True):
        ids = torch.tensor([generator.encode(request).example.tokens.tolist()])
        with torch.no_grad():
            want = reference.generate(
                **inputs_of(request, ids),
                max_new_tokens=request.sampling.max_new_tokens,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=stop[-1],
            )
        assert list(answer.tokens) == want[0, ids.shape[1] :].tolist(), f"prompt {request.id}"
    assert len({answer.tokens for answer in answers}) > len(requests) // 2, "the prompts hardly matter"


def parameters_in(kind: type, config: transformers.PretrainedConfig) -> int:
    """Count the parameters of transformers' class without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in kind(config).parameters())


def parameters_of(config) -> int:
    return sum(like.size for like in outline_of(config).shapes.values())
