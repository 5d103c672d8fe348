"""Solver tables against formulas in float64, and whole trajectories against diffusers' schedulers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from mindvl_jax.inference.diffusion.solvers import noise_levels, solve, table, trailing_times
from mindvl_jax.objectives.paths import Path

X0 = np.random.default_rng(0).normal(size=(2, 3, 4))
STEPS = 4
BETAS = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def torch_model(x, time):
    """A model that bends with the sample and the time, so that no order of a solver is exact."""
    return torch.tanh(x * 0.7) * (1 + time) + 0.3 * torch.sin(3 * x + time)


def jax_model(x, times):
    time = times.reshape(-1, 1, 1)
    return jnp.tanh(x * 0.7) * (1 + time) + 0.3 * jnp.sin(3 * x + time)


def reference(scheduler, sample, *, noise_scale=1.0, draws=None):
    """Run diffusers' scheduler on float64 samples."""
    x = torch.tensor(sample) * noise_scale
    for time in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        prediction = torch_model(inputs, time.double() / 1000)
        x = scheduler.step(prediction, time, x).prev_sample
    return x.numpy()


def check(ours, theirs, bar=1e-6):
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert error <= bar, f"relative difference {error:.2e}"


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_follows_diffusers_on_the_same_sigmas(shift):
    times = noise_levels(STEPS, shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=times[:-1].tolist())
    check(solve(jax_model, jnp.asarray(X0), table("euler", Path(), times)), reference(scheduler, X0))


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc"])
def test_multistep_solvers_follow_diffusers_on_flow_sigmas(solver):
    kind = DPMSolverMultistepScheduler if solver == "dpmpp_2m" else UniPCMultistepScheduler
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2)
    # Sigmas below 1: there the schedulers differ from each other in how they avoid an infinite log-SNR.
    times = np.append(np.array([0.97, 0.8, 0.55, 0.3, 0.12]), 0.0)
    scheduler.set_timesteps(5)
    scheduler.sigmas = torch.tensor(times)
    scheduler.timesteps = torch.tensor(times[:-1] * 1000)
    scheduler.num_inference_steps = 5
    check(solve(jax_model, jnp.asarray(X0), table(solver, Path(), times)), reference(scheduler, X0))


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc"])
def test_multistep_solvers_start_at_noise_alone(solver):
    rows = table(solver, Path(), noise_levels(6, 5.0))
    assert all(np.isfinite(column).all() for column in (rows.correct, rows.predict, rows.keep))
    exact = solve(lambda x, times: (x - 2.0) / times.reshape(-1, 1, 1), jnp.asarray(X0), rows)
    np.testing.assert_allclose(exact, 2.0, atol=2e-5)  # a model that knows the data is followed to them


@pytest.mark.parametrize("target", ["epsilon", "v"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
def test_solvers_follow_diffusers_on_published_betas(solver, target):
    kind = {"ddim": DDIMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}[solver]
    options = dict(clip_sample=False, set_alpha_to_one=True) if solver == "ddim" else dict(solver_order=2)
    prediction = {"epsilon": "epsilon", "v": "v_prediction"}[target]
    scheduler = kind(**BETAS, prediction_type=prediction, timestep_spacing="trailing", **options)
    path, times = Path(target), trailing_times(STEPS)
    alpha, sigma = path.table()
    # diffusers accumulates its betas in float32; the same float64 tables compare the solver alone
    scheduler.alphas_cumprod = torch.tensor(alpha**2)
    scheduler.set_timesteps(STEPS)
    np.testing.assert_array_equal(scheduler.timesteps.numpy(), np.round(times[:-1] * 1000))
    if solver != "ddim":
        steps = scheduler.timesteps.numpy()
        scheduler.sigmas = torch.tensor(np.append(sigma[steps] / alpha[steps], 0.0))
    else:
        scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    check(solve(jax_model, jnp.asarray(X0), table(solver, path, times)), reference(scheduler, X0))


def test_ancestral_keeps_the_mean_and_the_noise_of_diffusers():
    path, times = Path("epsilon"), trailing_times(STEPS)
    rows = table("ancestral", path, times)
    alpha, sigma = path.table()
    scheduler = EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    steps = scheduler.timesteps.numpy().astype(int)
    scheduler.sigmas = torch.tensor(np.append(sigma[steps] / alpha[steps], 0.0))
    x = torch.tensor(X0) / alpha[steps[0]]  # diffusers' samples are ours divided by alpha
    for row, step in enumerate(scheduler.timesteps):
        ours = x.numpy() * alpha[steps[row]]
        prediction = torch_model(torch.tensor(ours), float(times[row]))
        scheduler.scale_model_input(x, step)
        generator = torch.Generator().manual_seed(row)
        x = scheduler.step(prediction, step, x, generator=generator).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(row), dtype=torch.float64).numpy()
        clean = rows.keep[row] * ours + rows.of_prediction[row] * prediction.numpy()
        expected = rows.predict[row, 0] * ours + rows.predict[row, 1] * clean + rows.noise[row] * noise
        following = alpha[steps[row + 1]] if row + 1 < STEPS else 1.0
        check(expected / following, x.numpy())


def test_zero_terminal_snr_starts_from_noise_alone():
    alpha, sigma = Path("v", zero_terminal_snr=True).table()
    assert alpha[-1] == 0 and sigma[-1] == 1
    for solver in ("ddim", "ancestral"):
        rows = table(solver, Path("v", zero_terminal_snr=True), trailing_times(STEPS))
        assert all(np.isfinite(column).all() for column in (rows.keep, rows.predict, rows.noise))


def test_what_cannot_be_solved_is_refused():
    with pytest.raises(ValueError, match="use ddim"):
        table("euler", Path("epsilon"), trailing_times(3))
    with pytest.raises(ValueError, match="ancestral needs"):
        table("ancestral", Path(), noise_levels(3))
    with pytest.raises(ValueError, match="must decrease"):
        table("euler", Path(), np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="only v predicts"):
        Path("epsilon", zero_terminal_snr=True)
