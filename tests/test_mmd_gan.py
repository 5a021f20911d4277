"""mmd_gan.py against the authors' code: logged lines, schedule, hinge, clip, networks, who trains whom."""

import math

import pytest
import torch
from conftest import parameters
from torch import nn

import mmd_gan as script
from common import kernels, run


def features(seed=0, n=6, m=6, d=3):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x, torch.randn(m, d, generator=g, dtype=torch.float64) * 0.5 + 0.3


def literal_mmd2(x, y, kernel):
    """Mean over all pairs, i = j included, as double loops."""
    mean = lambda a, b: sum(kernel(((p - q) ** 2).sum().item()) for p in a for q in b) / len(a) / len(b)  # noqa: E731
    return mean(x, x) - 2 * mean(x, y) + mean(y, y)


# --- losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mmd2", "hinge", "ae", "objective", "g_loss"),
    [
        (0.006443, 0.0, (0.206355, 0.043809), -1.921044, 0.078190),
        (2.0e-5, -0.000380, (0.022983, 0.018258), -0.331539, None),
    ],
)
def test_logged_lines_of_the_authors_code(mmd2, hinge, ae, objective, g_loss):
    """methods.md 4.7: what its critic maximises, first and last line; g_loss is of another batch."""
    mmd, hinge = torch.tensor(mmd2).sqrt(), torch.tensor(hinge)
    c_loss = script.critic_loss(mmd, hinge, torch.tensor(sum(ae)), 16.0, 8.0)
    # mmd2 is printed to 6 decimals: with 2.0e-5 its root is known to 6e-5.
    assert -c_loss.item() == pytest.approx(objective, abs=0.5e-6 / 2 / math.sqrt(mmd2) + 2e-5)
    assert script.generator_loss(mmd, hinge, 16.0).item() == pytest.approx(
        math.sqrt(mmd2) + 16 * hinge.item()
    )
    if g_loss:
        assert script.generator_loss(mmd, hinge, 16.0).item() == pytest.approx(g_loss, abs=0.0025)


def test_hinge_of_the_example():
    """methods.md 12.2: mean f(x) - mean f(y) = (0.5, -0.5) gives -0.25, and -4 in what both players share."""
    x = torch.tensor([[0.0, 1.0], [2.0, 0.0]])  # means 1, 0.5
    y = torch.tensor([[0.5, 1.0]])
    hinge = script.rank_hinge(x, y)
    assert hinge.item() == pytest.approx(-0.25)
    nothing = torch.tensor(0.0)
    assert script.critic_loss(nothing, hinge, nothing, 16.0, 8.0).item() == pytest.approx(4.0)
    assert script.generator_loss(nothing, hinge, 16.0).item() == pytest.approx(-4.0)
    assert script.rank_hinge(x, x - 0.1).item() == 0


def test_hinge_is_its_equation():
    x, y = features(1, 5, 7, 4)
    differences = [sum(a).item() / 5 - sum(b).item() / 7 for a, b in zip(x.T, y.T)]
    expected = -sum(max(0.0, -difference) for difference in differences) / 4
    assert expected < 0
    assert script.rank_hinge(x, y).item() == pytest.approx(expected, abs=1e-14)


def test_signs():
    """Critic: parts the samples, obeys the hinge, reconstructs. Generator: joins the samples."""
    mmd, hinge, ae = (torch.tensor(v, requires_grad=True) for v in (0.3, -0.1, 0.2))
    c_grads = torch.autograd.grad(script.critic_loss(mmd, hinge, ae, 16.0, 8.0), (mmd, hinge, ae))
    g_grads = torch.autograd.grad(script.generator_loss(mmd, hinge, 16.0), (mmd, hinge))
    assert [g.item() for g in c_grads] == [-1, -16, 8]
    assert [g.item() for g in g_grads] == [1, 16]
    assert script.critic_loss(mmd, hinge, ae, 0.0, 0.0).item() == pytest.approx(-0.3)


def test_reconstruction_is_the_mean_over_all_elements():
    x = torch.arange(12.0).view(2, 1, 2, 3)
    decoder = nn.Sequential(nn.Linear(2, 6), nn.Unflatten(1, (1, 2, 3)))
    feat = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = sum((a - b) ** 2 for a, b in zip(x.flatten().tolist(), decoder(feat).flatten().tolist())) / 12
    assert script.reconstruction(decoder, x, feat).item() == pytest.approx(expected, rel=1e-6)


def test_identical_batches_send_no_nan():
    x = torch.randn(4, 3).requires_grad_()
    y = x.detach().clone().requires_grad_()
    mmd = kernels.sqrt_mmd(*kernels.gram_blocks(x, y, "rbf", (1.0, 2.0)))
    loss = script.critic_loss(mmd, script.rank_hinge(x, y), torch.tensor(0.0), 16.0, 8.0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, y)))


@pytest.mark.parametrize(
    ("kernel", "bandwidths", "function"),
    [
        ("rbf", (1, 2, 4, 8, 16), lambda d2: sum(math.exp(-d2 / 2 / s**2) for s in (1, 2, 4, 8, 16))),
        (
            "laplacian",
            (1, 2, 4, 8, 16),
            lambda d2: sum(math.exp(-math.sqrt(d2) / s) for s in (1, 2, 4, 8, 16)),
        ),
        ("rq", (0.2, 0.5, 1, 2, 5), lambda d2: sum((1 + d2 / 2 / a) ** -a for a in (0.2, 0.5, 1, 2, 5))),
    ],
)
def test_default_kernels_and_critic_loss_of_one_step(tmp_path, monkeypatch, kernel, bandwidths, function):
    """What train hands to the losses, from the features it has made: first critic update of step 1."""
    seen = {}
    gram_blocks, critic_loss = kernels.gram_blocks, script.critic_loss

    def spy_blocks(x, y, *args):
        seen.setdefault("features", (x.detach(), y.detach(), args))
        return gram_blocks(x, y, *args)

    def spy_loss(mmd, hinge, *args):
        seen.setdefault("terms", (mmd.item(), hinge.item(), *args))
        return critic_loss(mmd, hinge, *args)

    monkeypatch.setattr(kernels, "gram_blocks", spy_blocks)
    monkeypatch.setattr(script, "critic_loss", spy_loss)
    train(tmp_path, dataset="digits", kernel=kernel, total_steps=1, batch_size=8, lambda_rank=16.0)
    x, y, (name, values) = seen["features"]
    mmd, hinge, _, lambda_rank, lambda_ae = seen["terms"]
    assert (name, values, lambda_rank, lambda_ae) == (kernel, bandwidths, 16, 8)
    assert mmd**2 == pytest.approx(max(0, literal_mmd2(x.double(), y.double(), function)), abs=2e-6)
    assert hinge == pytest.approx(-(y.mean(0) - x.mean(0)).clamp_min(0).mean().item(), abs=1e-7)


def test_second_bandwidth_set_has_a_quarter_of_the_mmd2():
    """methods.md 1.3: in the limit of small features MMD^2 is sum 1/s^2 times the squared mean difference."""
    x, y = features(2, 50, 50, 10)
    x, y = 0.01 * x, 0.01 * y
    first, second = (
        kernels.mmd2(*kernels.gram_blocks(x, y, "rbf", b), "biased").item()
        for b in (BANDWIDTHS, tuple(2 * s for s in BANDWIDTHS))
    )
    assert first / second == pytest.approx(4, abs=0.02)
    assert first == pytest.approx(1.33203125 * (x.mean(0) - y.mean(0)).square().sum().item(), rel=0.01)


BANDWIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)


def test_clip_takes_batch_norm_too_and_zero_is_off():
    critic = script.Critic((1, 32, 32), 10, 8, False, False)
    before = [p.clone() for p in critic.parameters()]
    script.clip_parameters(critic, 0.0)
    assert all(torch.equal(p, q) for p, q in zip(critic.parameters(), before))
    script.clip_parameters(critic, 0.01)
    assert all(p.abs().max() <= 0.01 for p in critic.parameters())
    scales = [m.weight for m in critic.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(scales) == 2
    assert all((w == 0.01).all() for w in scales)


# --- schedule --------------------------------------------------------------------------------------

PAPER = script.Args(n_critic=5, warmup_critic=100)


def test_critic_steps():
    counts = [script.critic_steps(step, PAPER) for step in range(1, 1503)]
    assert counts[:25] == [100] * 25
    assert [i for i, n in enumerate(counts) if n == 100] == [*range(25), 500, 1000, 1500]
    assert set(counts) == {5, 100}
    assert sum(counts[:25]) + 25 == 2525  # methods.md T-23


def epochs_of_the_authors_loader(batches, epochs):
    """Generator updates in the first epoch and in all; one is lost where its critic takes the last batch."""
    done = first = 0
    for epoch in range(epochs):
        left = batches
        while left > 0:
            left -= min(left, script.critic_steps(done + 1, PAPER))
            if left == 0:
                break  # no batch for the generator, whose count stays
            left -= 1
            done += 1
        first = done if epoch == 0 else first
    return first, done


@pytest.mark.parametrize(
    ("batches", "first", "total"), [(938, 9, 149_640), (782, None, 124_614), (2544, None, 410_336)]
)
def test_step_counts_of_1000_epochs(batches, first, total):
    """methods.md 12.10, from a simulation of [C]'s loop over its loader; [B]'s log ends at 149 640."""
    found = epochs_of_the_authors_loader(batches, 1000)
    assert found[1] == total
    assert first in (None, found[0])
    named = {938: "mnist", 782: "cifar10"}
    if batches in named:
        assert script.DEFAULTS[named[batches]]["total_steps"] == total


# --- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "k", "generator", "encoder"),
    [
        ((1, 32, 32), 10, 698_240, 698_112),
        ((3, 32, 32), 128, 1_183_616, 1_183_488),
        ((3, 64, 64), 64, 3_281_792, 3_281_664),
        ((3, 64, 64), 128, 3_806_080, 3_805_952),
    ],
)
def test_parameter_counts_of_the_authors_networks(shape, k, generator, encoder):
    assert parameters(script.Generator(shape, k, 64)) == generator
    assert parameters(script.Decoder(shape, k, 64)) == generator
    assert parameters(script.Critic(shape, k, 64, False, False)) == encoder


def test_parameter_counts_of_the_gram_networks():
    """Tables 5 to 7 of [S]: dense 128 -> 2048 and back, 4x4 kernels, batch norm on all but the output."""
    dense, images = 128 * 2048, (3, 32, 32)
    convs = 16 * (128 * 64 + 64 * 32 + 32 * 3)
    assert parameters(script.Generator(images, 128, 32)) == dense + convs + 2 * (128 + 64 + 32)
    assert parameters(script.Critic(images, 128, 32, True, False)) == dense + convs + 2 * (128 + 64 + 32)
    weak = 16 * (3 * 32 + 32 * 32 + 32 * 64) + 1024 * 128
    assert parameters(script.Critic(images, 128, 32, True, True)) == weak + 2 * (32 + 32 + 64)


def test_ends_of_the_networks_are_dense_layers():
    """Deviation 7: a 4x4 convolution from or to 1x1 is a dense layer and a reshape."""
    generator, critic = script.Generator((3, 32, 32), 7, 4), script.Critic((3, 32, 32), 7, 4, True, False)
    z, first = torch.randn(5, 7), generator.layers[1]
    torch.testing.assert_close(first(z[:, :, None, None]), (z @ first.weight.flatten(1)).view(5, 16, 4, 4))
    h, last = torch.randn(5, 16, 4, 4), critic.layers[-2]
    torch.testing.assert_close(last(h).flatten(1), h.flatten(1) @ last.weight.flatten(1).T)


def test_layers_of_the_authors_networks():
    names = lambda m: [type(layer).__name__ for layer in m.layers]  # noqa: E731
    norm = ["BatchNorm2d", "ReLU"]
    deconv = ["ConvTranspose2d"]
    assert names(script.Generator((1, 32, 32), 10, 64)) == [
        "Unflatten", *(deconv + norm) * 3, *deconv, "Tanh",
    ]  # fmt: skip
    for gram, first in ((False, []), (True, ["BatchNorm2d"])):
        critic = names(script.Critic((1, 32, 32), 10, 64, gram, False))
        assert critic == [
            "Conv2d", *first, "LeakyReLU", *["Conv2d", "BatchNorm2d", "LeakyReLU"] * 2, "Conv2d", "Flatten",
        ]  # fmt: skip


def test_initialisation():
    torch.manual_seed(0)
    generator = script.Generator((1, 32, 32), 64, 64)
    for m in generator.modules():
        if isinstance(m, nn.ConvTranspose2d):
            assert m.weight.std().item() == pytest.approx(0.02, rel=0.1)
        elif isinstance(m, nn.BatchNorm2d):
            assert m.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert m.weight.std().item() == pytest.approx(0.02, rel=0.3)
            assert (m.bias == 0).all()


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 48, 48), (2,), (3,)])
def test_networks_fit_each_shape(shape):
    fake = script.Generator(shape, 5, 8)(torch.randn(4, 5))
    feat = script.Critic(shape, 3, 8, False, False)(fake)
    assert fake.shape == (4, *shape)
    assert feat.shape == (4, 3)
    assert script.Decoder(shape, 3, 8)(feat).shape == (4, *shape)


# --- training --------------------------------------------------------------------------------------


def train(tmp_path, **kwargs):
    values = dict(dataset="8gaussians", total_steps=3, batch_size=16, width=8, eval_every=0, warmup_critic=2)
    return script.train(script.Args(runs_dir=str(tmp_path), **{**values, **kwargs}))


def state(tmp_path):
    (path,) = tmp_path.glob("*/checkpoint.pt")
    return torch.load(path, weights_only=True)


VARIANTS = [
    {}, dict(lambda_ae=0.0), dict(lambda_rank=0.0), dict(lambda_rank=16.0), dict(clip=0.0),
    dict(kernel="laplacian"), dict(kernel="rq"), dict(ema_decay=0.9),
    dict(bandwidths=(2.0, 4.0, 8.0, 16.0, 32.0)),
]  # fmt: skip


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
@pytest.mark.parametrize("dataset", ["digits", "swissroll"])
def test_variants_run(tmp_path, dataset, kwargs):
    assert train(tmp_path, dataset=dataset, eval_samples=64, **kwargs) == {}
    saved = state(tmp_path)
    assert saved["step"] == 3
    assert any(name.startswith("decoder.") for name in saved["critic"]) == (kwargs.get("lambda_ae") != 0)


@pytest.mark.parametrize("weak", [False, True])
def test_gram_architecture_runs(tmp_path, weak):
    metrics = train(
        tmp_path,
        dataset="digits",
        architecture="gram",
        weak_critic=weak,
        eval_samples=64,
        eval_every=3,
        width=None,
    )
    assert set(metrics) == {"pixel_frechet", "pixel_kid", "pixel_kid_se", "pixel_mmd"}
    assert state(tmp_path)["args"]["width"] == 32


def test_gram_architecture_on_points(tmp_path):
    """Appendix B of [S]: G h-100-100-2, critic 2-100-100-10, hinge, clip 0.1, 5e-5, 5 updates, sigma 1."""
    args = script.resolve(script.Args(dataset="ring2d", architecture="gram"))
    settings = args.batch_size, args.width, args.critic_width, args.feature_dim, args.latent_dim
    assert settings == (200, 100, 100, 10, 2)
    assert (args.lambda_ae, args.lambda_rank, args.clip, args.bandwidths) == (8.0, 16.0, 0.1, (1.0,))
    assert (args.learning_rate, args.critic_learning_rate, args.n_critic, args.warmup_critic) == (
        5e-5,
        5e-5,
        5,
        5,
    )
    assert parameters(script.Generator((2,), 2, 100, True)) == 10_602
    assert parameters(script.Critic((2,), 10, 100, True, False)) == 11_410

    options = dict(dataset="ring2d", architecture="gram", width=20, critic_width=12, total_steps=1)
    train(tmp_path, **options)
    saved = state(tmp_path)
    assert saved["generator"]["layers.0.weight"].shape == (20, 2)
    assert saved["generator"]["layers.4.weight"].shape == (2, 20)  # two hidden layers
    assert saved["critic"]["layers.0.weight"].shape == (12, 2)
    assert saved["critic"]["layers.4.weight"].shape == (10, 12)
    assert saved["critic"]["decoder.layers.0.weight"].shape == (12, 10)


@pytest.mark.parametrize("dataset", ["digits", "ring2d"])
def test_critic_width_is_the_critics_alone(dataset, tmp_path):
    train(tmp_path, dataset=dataset, width=8, critic_width=12, total_steps=1)
    saved = state(tmp_path)
    first, last = ("layers.0.weight", "layers.4.weight") if dataset == "digits" else ("layers.0.weight",) * 2
    assert saved["critic"][first].shape[0] == 12
    assert saved["generator"][last].shape[0] == 8
    assert script.resolve(script.Args(dataset=dataset, width=20)).critic_width == 20


@pytest.mark.parametrize(
    ("features", "title"), [(2, "projected space"), (5, "first two principal components")]
)
def test_picture_of_points_shows_the_projected_space(features, title, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text, *args, **kwargs: titles.append(text))
    train(tmp_path, dataset="ring2d", architecture="gram", feature_dim=features, total_steps=1)
    assert len(list(tmp_path.glob("*/samples/0000001.png"))) == 1
    assert "data space" in titles
    assert any(title in text for text in titles)


def test_the_reports_curve_is_of_the_critics_last_batch(tmp_path, monkeypatch):
    """[B], Figure 4: M^2 of the last critic update before an update of the generator."""
    from torch.utils.tensorboard import SummaryWriter

    seen, logged = [], {}
    critic_loss = script.critic_loss

    def spy(mmd, *rest):
        seen.append(mmd.item())
        return critic_loss(mmd, *rest)

    def add_scalar(self, tag, value, step):
        logged[tag] = torch.as_tensor(value).item()

    monkeypatch.setattr(script, "critic_loss", spy)
    monkeypatch.setattr(SummaryWriter, "add_scalar", add_scalar)
    train(tmp_path, dataset="digits", total_steps=1, warmup_critic=3)
    assert len(seen) == 3
    assert logged["losses/critic_mmd2"] == pytest.approx(seen[-1] ** 2, rel=1e-6)
    assert logged["losses/critic_mmd2"] != pytest.approx(logged["losses/mmd"] ** 2, rel=1e-3)
    assert "losses/autoencoder" in logged

    logged.clear()
    train(tmp_path, dataset="digits", total_steps=1, lambda_ae=0.0)
    assert "losses/critic" in logged
    assert "losses/autoencoder" not in logged  # nothing was computed


def test_convolutions_lie_channels_last(tmp_path, monkeypatch):
    """On CPUs too, where a step is faster so; the optimiser's moments as well."""
    models = {}
    monkeypatch.setattr(run, "save_checkpoint", lambda *given: models.update(given[4]))
    train(tmp_path, dataset="digits", total_steps=1, ema_decay=0.9)
    lying = lambda t: t.is_contiguous(memory_format=torch.channels_last)  # noqa: E731
    for name in ("generator", "critic", "ema"):  # the decoder is a part of the critic
        weights = [p for p in models[name].parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
        assert weights
        assert all(map(lying, weights))
    moments = [state["square_avg"] for state in models["c_optimizer"].state.values()]
    assert all(lying(m) for m in moments if m.ndim == 4 and min(m.shape[1:]) > 1)


@pytest.mark.parametrize(("dataset", "weight"), [("digits", 16.0), ("8gaussians", 0.0)])
def test_hinge_is_on_for_images_only(tmp_path, dataset, weight):
    """Deviation 6: samples that no tanh bounds run away from it."""
    train(tmp_path, dataset=dataset, total_steps=1)
    assert state(tmp_path)["args"]["lambda_rank"] == weight
