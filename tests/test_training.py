"""Losses, noise levels and the step of training."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import FIXTURES, count_compilations, fake_tensor, relative_error
from optax.contrib import MuonDimensionNumbers

from eqxdiff.checkpoint import export_infos, export_tensors, load_module, read_table
from eqxdiff.models.flux1 import FluxCondition, Transformer, TransformerConfig
from eqxdiff.models.flux1.conditioning import FluxShared
from eqxdiff.models.flux1.predictor import FluxPredictor
from eqxdiff.nn import Linear
from eqxdiff.sampling import X0, Conditioned, Denoiser, Epsilon, Flow, Row, VPrediction
from eqxdiff.sampling.discrete import DiscreteSchedulerConfig, alphas_cumprod
from eqxdiff.tensors import InMemory
from eqxdiff.training import (
    Discrete,
    LogitNormal,
    Task,
    TrainState,
    Uniform,
    denoising_loss,
    gradients,
    kl_divergence,
    min_snr_weight,
    reconstruction_loss,
    select,
    train_step,
)
from eqxdiff.training.config import OptimizerConfig
from eqxdiff.training.optimizer import make_optimizer
from eqxdiff.training.step import average, ema_rate
from eqxdiff.training.studio import with_remat
from eqxdiff.vae import Posterior


CONFIG = TransformerConfig(
    attention_head_dim=8,
    axes_dims_rope=(2, 2, 4),
    in_channels=8,
    joint_attention_dim=12,
    num_attention_heads=2,
    num_layers=2,
    num_single_layers=2,
    pooled_projection_dim=10,
)


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURES / "training.npz") as file:
        return dict(file)


def transformer(*, remat: bool = False) -> Transformer:
    table = read_table("flux1_transformer")
    skeleton = eqx.filter_eval_shape(lambda: Transformer.init(CONFIG, key=jax.random.key(0)))
    tensors = {
        name: fake_tensor(name, i.shape) for name, i in export_infos(skeleton, table).items()
    }
    model = load_module(InMemory(tensors), table, skeleton)
    return with_remat(model) if remat else model


def flow_loss(model, batch, keys):
    """Rectified flow at given noise and levels."""

    def one(x0, noise, txt, pooled, sigma):
        network = FluxPredictor(model, FluxShared(None), jnp.float32)
        denoiser = Denoiser(Conditioned(network, FluxCondition(txt, pooled)), Flow())
        row = Row(1 - sigma, sigma, 1000 * sigma)
        return denoising_loss(denoiser, x0, noise, row)

    names = ("x0", "noise", "txt", "pooled", "sigma")
    return jnp.mean(jax.vmap(one)(*(batch[name] for name in names))), {}


def read_batch(reference):
    batch = {name: jnp.asarray(reference[name]) for name in ("txt", "pooled", "sigma")}
    batch |= {n: jnp.asarray(reference[n].transpose(0, 2, 3, 1)) for n in ("x0", "noise")}
    return batch


@pytest.mark.parametrize("remat", [False, True])
def test_a_step_of_flux_has_the_loss_and_gradients_of_diffusers(reference, remat):
    params, frozen = eqx.partition(transformer(remat=remat), eqx.is_inexact_array)
    task = Task(frozen, flow_loss, optax.sgd(1.0), jax.random.key(0))
    keys = jax.random.split(jax.random.key(0), 3)
    grads, loss, _ = eqx.filter_jit(gradients)(task, params, read_batch(reference), keys)
    assert abs(float(loss) / reference["loss"] - 1) < 1e-5
    ours = dict(export_tensors(eqx.combine(grads, frozen), read_table("flux1_transformer")))
    theirs = {n.removeprefix("grad/"): v for n, v in reference.items() if n.startswith("grad/")}
    assert ours.keys() == theirs.keys()
    whole = lambda grads: np.concatenate([grads[name].ravel() for name in theirs])
    assert relative_error(whole(ours), whole(theirs)) < 1e-5
    for name, grad in theirs.items():
        bound = max(1e-5, 5 * reference[f"rounding/{name}"])
        assert relative_error(ours[name], grad) < bound, name


class Toy(eqx.Module):
    """Two layers, and their error on a linear problem."""

    first: Linear
    second: Linear

    @classmethod
    def init(cls):
        keys = jax.random.split(jax.random.key(0))
        return cls(*(Linear.init(8, 8, key=key) for key in keys))


def toy_loss(model, batch, keys):
    x, y = batch
    error = model.second(jnp.tanh(model.first(x))).astype(jnp.float32) - y
    return jnp.mean(jnp.square(error)), {"worst": jnp.max(jnp.abs(error))}


def toy_batch(dtype=jnp.float32):
    x = fake_tensor("x", (4, 8), 2.0)
    return jnp.asarray(x, dtype), jnp.asarray(np.sin(3 * x))


def toy_task(patterns=(".",), optimizer=None, **given) -> tuple[Task, TrainState]:
    model, optimizer = Toy.init(), optimizer or optax.adam(1e-2)
    params, frozen = eqx.partition(model, select(model, patterns))
    task = Task(frozen, toy_loss, optimizer, jax.random.key(0), **given)
    return task, TrainState.init(params, optimizer, ema=True)


def test_a_step_in_bfloat16_keeps_float32_weights():
    exact = float(toy_loss(Toy.init(), toy_batch(), None)[0])
    after, loss, metrics = train_step(*toy_task(), toy_batch(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype(jnp.float32)}
    assert 0 < abs(float(loss) / exact - 1) < 0.02
    assert metrics.keys() == {"worst", "gradient"}
    assert float(metrics["gradient"]) > 0


def test_steps_lower_the_loss_and_compile_once():
    task, state = toy_task()
    losses = []
    for step in range(30):
        if step == 1:
            with count_compilations() as compiled:
                state, loss, _ = train_step(task, state, toy_batch())
        else:
            state, loss, _ = train_step(task, state, toy_batch())
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert int(state.step) == 30
    assert len(compiled) <= 2  # of the numbers of the batch alone


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("ema", [False, True])
def test_steps_leave_the_users_model_alive_and_unchanged(dtype, ema):
    """A step gives the buffers of its state away: none of them may belong to the model."""
    model = jax.tree.map(lambda x: x.astype(dtype), Toy.init())
    before = jax.tree.map(np.array, model)
    params, frozen = eqx.partition(model, select(model, (r"first\.",)))
    task = Task(frozen, toy_loss, optax.adam(1e-2), jax.random.key(0))
    state = TrainState.init(params, task.optimizer, ema=ema)
    for _ in range(2):
        state, *_ = train_step(task, state, toy_batch())
    jax.tree.map(np.testing.assert_array_equal, model, before)
    assert not np.array_equal(state.params.first.weight, before.first.weight)


def test_only_what_is_selected_is_trained():
    before = Toy.init()
    task, state = toy_task((r"first\.", r"second\.bias"))
    state, *_ = train_step(task, state, toy_batch())
    after = eqx.combine(state.params, task.frozen)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after, before)
    assert all(jax.tree.leaves(moved.first))
    assert moved.second.bias
    assert not moved.second.weight


def test_muon_trains_matrices_and_adam_the_rest():
    """Each layer of stacked matrices by itself: all its singular values move alike."""
    params = {"w": jnp.asarray(fake_tensor("w", (2, 6, 4))), "b": jnp.ones(4)}
    axes = {"w": MuonDimensionNumbers((2,), (1,)), "b": None}
    config = OptimizerConfig(name="muon", learning_rate=0.1, warmup=0, clip=1e9)
    optimizer = make_optimizer(config, 10, axes)
    grads = {"w": jnp.asarray(fake_tensor("g", (2, 6, 4))), "b": jnp.asarray([1.0, -2.0, 3.0, 4.0])}
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
    values = np.linalg.svd(np.asarray(updates["w"]), compute_uv=False)
    assert values.min() > 0.5 * values.max()
    np.testing.assert_allclose(updates["b"] / updates["b"][0], [1, -1, 1, 1], rtol=1e-4)


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.25), (3, 1.0), (6, 1.0), (8, 0.5), (9, 0.25)], ids=str
)
def test_the_rate_goes_up_and_comes_down(step, rate):
    config = OptimizerConfig(learning_rate=1.0, warmup=4, cooldown=4, clip=1e9)
    optimizer = make_optimizer(config, 10, None)
    params, grads = jnp.zeros(1), jnp.ones(1)
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(step + 1):
            updates, state = optimizer.update(grads, state, params)
    assert float(updates[0]) == pytest.approx(-rate, rel=1e-3)


def test_what_selects_nothing_is_an_error():
    with pytest.raises(ValueError, match="lora matches no parameter"):
        select(Toy.init(), ["first", "lora"])


def test_a_batch_in_parts_has_the_same_gradients():
    (whole, state), (parts, _) = toy_task(), toy_task(accumulate=2)
    keys = jax.random.split(jax.random.key(0), 4)
    one, two = (gradients(task, state.params, toy_batch(), keys) for task in (whole, parts))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        *((grads, loss) for grads, loss, _ in (one, two)),
    )


def test_a_batch_that_cannot_be_cut_is_an_error():
    with pytest.raises(ValueError, match="4 is no multiple of 3"):
        train_step(*toy_task(accumulate=3), toy_batch())


def test_the_average_follows_the_weights():
    """The mean at first, and an exponential average in the long run."""
    assert float(ema_rate(0.999, jnp.asarray(0))) == pytest.approx(0.1)
    assert float(ema_rate(0.999, jnp.asarray(10**6))) == pytest.approx(0.999)
    ema = average({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, jnp.asarray(0.9))
    np.testing.assert_allclose(ema["w"], 0.1, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.95])
def test_min_snr_weighs_every_parameterization_by_the_error_of_x0(alpha):
    """The closed forms of the paper, and the loss in x0 that they stand for."""
    row = Row(jnp.asarray(alpha), jnp.sqrt(1 - jnp.asarray(alpha) ** 2), jnp.asarray(0.0))
    snr = alpha**2 / (1 - alpha**2)
    least = min(snr, 5)
    for parameterization, weight in (
        (Epsilon(), least / snr),
        (VPrediction(), least / (snr + 1)),
        (X0(), least),
    ):
        assert float(min_snr_weight(row, parameterization)) == pytest.approx(weight, rel=1e-4)
    sigma = jnp.asarray(1 - alpha)
    straight = Row(1 - sigma, sigma, 1000 * sigma)
    least = min((alpha / (1 - alpha)) ** 2, 5)
    assert float(min_snr_weight(straight, Flow())) == pytest.approx(
        least * (1 - alpha) ** 2, rel=1e-4
    )


@pytest.mark.parametrize(("alpha", "sigma"), [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("parameterization", [Epsilon(), VPrediction(), X0()])
def test_min_snr_is_finite_at_both_ends(alpha, sigma, parameterization):
    row = Row(jnp.asarray(alpha), jnp.asarray(sigma), jnp.asarray(0.0))
    assert np.isfinite(float(min_snr_weight(row, parameterization)))


@pytest.mark.parametrize("parameterization", [Epsilon(), VPrediction(), X0(), Flow()])
def test_a_perfect_network_has_no_loss(parameterization):
    x0, noise = jnp.asarray([1.0, -2.0]), jnp.asarray([0.5, 3.0])
    row = Row(jnp.asarray(0.6), jnp.asarray(0.8), jnp.asarray(500.0))
    right = Denoiser(lambda x, row: parameterization.target(x0, noise, row), parameterization)
    wrong = Denoiser(lambda x, row: right.predict(x, row) + 0.5, parameterization)
    assert float(denoising_loss(right, x0, noise, row)) == 0
    assert float(denoising_loss(wrong, x0, noise, row)) == pytest.approx(0.25)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_have_the_distribution_that_they_are_named_for(shift):
    keys = jax.random.split(jax.random.key(0), 4000)
    normal = jax.vmap(LogitNormal(0.3, 0.7, shift).sample)(keys)
    logit = np.log(normal.sigma / (1 - normal.sigma)) - np.log(shift)  # a shift moves the logit
    assert np.mean(logit) == pytest.approx(0.3, abs=0.05)
    assert np.std(logit) == pytest.approx(0.7, abs=0.05)
    uniform = jax.vmap(Uniform(shift).sample)(keys)
    level = uniform.sigma / (shift - (shift - 1) * uniform.sigma)
    np.testing.assert_allclose(np.quantile(level, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)
    for row in (normal, uniform):
        np.testing.assert_allclose(row.alpha + row.sigma, 1, rtol=1e-6)
        np.testing.assert_allclose(row.timestep, 1000 * row.sigma, rtol=1e-6)


def test_discrete_levels_are_those_of_the_schedule():
    config = DiscreteSchedulerConfig("DDIMScheduler")
    rows = jax.vmap(Discrete.init(config).sample)(jax.random.split(jax.random.key(0), 3000))
    index = np.asarray(rows.timestep).astype(int)
    assert index.min() < 10
    assert index.max() > 990
    np.testing.assert_allclose(np.square(rows.alpha), alphas_cumprod(config)[index], rtol=1e-5)
    np.testing.assert_allclose(np.square(rows.alpha) + np.square(rows.sigma), 1, rtol=1e-5)


def test_the_divergence_is_that_of_gaussians():
    flat = Posterior(jnp.zeros((2, 2, 3)), jnp.zeros((2, 2, 3)))
    assert float(kl_divergence(flat)) == 0
    apart = Posterior(jnp.full((2, 2, 3), 1.5), jnp.full((2, 2, 3), jnp.log(4.0)))
    assert float(kl_divergence(apart)) == pytest.approx(0.5 * (1.5**2 + 4 - 1 - np.log(4)))


def test_edges_see_what_pixels_hardly_do():
    """A checkerboard of a small contrast differs little from gray and much in its edges."""
    board = jnp.asarray((np.indices((8, 8)).sum(0) % 2)[:, :, None] * 0.2 - 0.1, jnp.float32)
    gray = jnp.zeros_like(board)
    assert float(reconstruction_loss(gray, board, 0.0)) == pytest.approx(0.1)
    assert float(reconstruction_loss(gray, board, 1.0)) == pytest.approx(0.1 + 0.4)
    assert float(reconstruction_loss(board, board, 1.0)) == 0
