"""The first updates of each training loop, redone by hand from the equations of its paper, in float64.

What is held: which batch, noise and graph an update has, whose parameters it moves, in which order, with
which optimiser, penalty and clipping, what batch norm and spectral norm have seen, and the moving average.
Weights, buffers, the optimisers' moments, and the gradients that the last update of each player left.
"""

import copy
import itertools
from importlib import import_module

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import keystr, tree_flatten_with_path

from common import datasets, run


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """All in float64: what train casts with .float() too."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- the means of the papers' equations ------------------------------------------------------------


def gram(a, b, args, bound=lambda d2: d2):
    """rbf or rq of all pairs, summed over the bandwidths, from explicit differences."""
    d2 = bound((a[:, None] - b[None]).square().sum(2))
    rq = args.kernel == "rq"
    return sum((1 + d2 / (2 * s)) ** -s if rq else torch.exp(-d2 / (2 * s * s)) for s in args.bandwidths)


def mean_kernel(a, b, args, drop_diagonal=False, **bound):
    k, n = gram(a, b, args, **bound), len(a)
    return (k.sum() - k.trace()) / (n * (n - 1)) if drop_diagonal else k.mean()


def mmd(x, y, args):
    """The root of the biased estimate."""
    return (mean_kernel(x, x, args) - 2 * mean_kernel(x, y, args) + mean_kernel(y, y, args)).sqrt()


def norm2(outputs, inputs):
    """||grad of each sample's outputs (n, d) by its input||_F^2, (n,)."""
    grads = [torch.autograd.grad(out.sum(), inputs, create_graph=True)[0] for out in outputs.T]
    return sum(grad.flatten(1).square().sum(1) for grad in grads)


def descend(*players, clip=0.0):
    """All gradients first, each of a loss by its optimiser's parameters, then a step of each optimiser."""
    params = [optimizer.param_groups[0]["params"] for optimizer, _ in players]
    grads = [torch.autograd.grad(loss, p, retain_graph=True) for p, (_, loss) in zip(params, players)]
    for (optimizer, _), theirs, found in zip(players, params, grads):
        for p, grad in zip(theirs, found):
            factor = min(1.0, clip / (grad.norm().item() + 1e-6)) if clip else 1.0
            p.grad = grad * factor
        optimizer.step()


def adam(module, rate, args):
    return torch.optim.Adam(module.parameters(), rate, (args.beta1, args.beta2))


# --- each script's game ----------------------------------------------------------------------------
# A game returns what train saves, and the function that makes update 1, 2, ... of the generator.


def smmd_gan(script, args, data):
    generator = script.Generator(data.shape, args.latent_dim, args.width)
    critic = script.Critic(data.shape, args.feature_dim, args.width)
    script.normalise(critic, args.critic_norm, True)
    g_optimizer = adam(generator, args.learning_rate, args)
    c_optimizer = adam(critic, args.critic_learning_rate, args)
    penalised = args.constraint == "gradient-penalty"

    def update(step, batches):
        for turn in ["critic"] * args.warmup_critic + ["generator"]:
            real = next(batches).requires_grad_()
            fake = generator(torch.rand(len(real), args.latent_dim) * 2 - 1)
            fake = fake.detach() if turn == "critic" else fake
            samples = [real, fake]
            if penalised and turn == "critic":
                u = torch.rand(len(real), 1, 1, 1)
                samples.append((1 - u) * real + u * fake)
            # One pass of all: the vectors of spectral norm move once, and all see the same weights.
            layers = [output.chunk(len(samples)) for output in critic(torch.cat(samples))]
            x, y, *m = layers[-1]
            within = mean_kernel(x, x, args, True) + mean_kernel(y, y, args, True)
            distance, scale = within - 2 * mean_kernel(x, y, args), 1.0
            size, curvature = norm2(x, real).mean(), sum(s**-2 for s in args.bandwidths)  # k's, at 0
            if args.constraint == "scaled":
                poster = args.lambda_scale + len(args.bandwidths) + curvature * size  # k(x, x) = 1 each
                scale = 1 / (poster if args.scale_form == "poster" else 1 + args.lambda_scale * size)
            elif args.constraint == "swgan":
                distance = x.mean() - y.mean()
                scale = (1 + args.lambda_scale * (size + x.square().sum(1).mean())) ** -0.5
            if turn == "generator":
                constant = scale.detach() if isinstance(scale, torch.Tensor) else scale
                descend((g_optimizer, constant * distance), clip=args.clip_norm)
                continue
            c_loss = -scale * distance
            if penalised:
                witness = gram(m[0], x, args).mean(1) - gram(m[0], y, args).mean(1)
                slope = (norm2(witness[:, None], samples[2]) + 1e-5).sqrt()
                c_loss = c_loss + args.lambda_gp * (slope - 1).square().mean()
                activity = sum(h.square().mean() for real_h, fake_h, _ in layers for h in (real_h, fake_h))
                c_loss = c_loss + args.lambda_activation * activity
            descend((c_optimizer, c_loss), clip=args.clip_norm)

    return dict(generator=generator, critic=critic, g_optimizer=g_optimizer, c_optimizer=c_optimizer), update


def mmd_gan(script, args, data):
    generator = script.Generator(data.shape, args.latent_dim, args.width)
    critic = script.Critic(data.shape, args.feature_dim, args.width, False, False)
    encoder = [*critic.parameters()]
    decoder = script.Decoder(data.shape, args.feature_dim, args.width) if args.lambda_ae else nn.Identity()
    critic.decoder = decoder
    g_optimizer = torch.optim.RMSprop(generator.parameters(), args.learning_rate)
    both = [*encoder, *decoder.parameters()]
    c_optimizer = torch.optim.RMSprop(both, args.critic_learning_rate)

    def objective(x, y):
        return mmd(x, y, args) - args.lambda_rank * F.relu(y.mean(0) - x.mean(0)).mean()

    def update(step, batches):
        for _ in range(args.warmup_critic):
            for p in encoder:
                p.data = p.data.clamp(-args.clip, args.clip)
            real = next(batches)
            fake = generator(torch.randn(len(real), args.latent_dim)).detach()
            x, y = critic(real), critic(fake)  # apart: to each its own batch norm
            c_loss = -objective(x, y)
            if args.lambda_ae:
                errors = (real - decoder(x)).square().mean(), (fake - decoder(y)).square().mean()
                c_loss = c_loss + args.lambda_ae * sum(errors)
            descend((c_optimizer, c_loss))
        real = next(batches)
        fake = generator(torch.randn(len(real), args.latent_dim))
        descend((g_optimizer, objective(critic(real), critic(fake))))

    return dict(generator=generator, critic=critic, g_optimizer=g_optimizer, c_optimizer=c_optimizer), update


def gamn(script, args, data):
    generator = script.Generator(data.shape, args.latent_dim, args.width)
    mapper = script.Critic(data.shape, args.feature_dim, args.width)
    g_optimizer = adam(generator, args.learning_rate, args)
    c_optimizer = adam(mapper, args.critic_learning_rate, args)

    def penalty(real, fake):
        if args.regularizer == "gp":
            u = torch.rand(len(real), 1, 1, 1)
            between = ((1 - u) * real + u * fake).requires_grad_()
            slope = norm2(mapper(between).sum(1, keepdim=True), between).sqrt()
            return (slope - args.gp_target).square().mean()
        if args.regularizer == "weight-decay":
            return sum(p.square().sum() for p in mapper.parameters())
        norms = [m for m in mapper.modules() if isinstance(m, nn.GroupNorm)]
        power = {"l1": 1, "l2": 2}[args.regularizer]
        return sum(p.abs().pow(power).sum() for m in norms for p in (m.weight, m.bias))

    def update(step, batches):
        for _ in range(args.n_critic if step % args.n_generator == 1 % args.n_generator else 0):
            real = next(batches)
            fake = generator(torch.randn(len(real), args.latent_dim)).detach()
            c_loss = args.lambda_reg * penalty(real, fake) - mmd(mapper(real), mapper(fake), args)
            descend((c_optimizer, c_loss))
        real = next(batches)
        fake = generator(torch.randn(len(real), args.latent_dim))
        g_loss = mmd(mapper(real), mapper(fake), args)
        if args.data_mmd_weight:
            g_loss = g_loss + args.data_mmd_weight * mmd(real.flatten(1), fake.flatten(1), args)
        descend((g_optimizer, g_loss))

    return dict(generator=generator, critic=mapper, g_optimizer=g_optimizer, c_optimizer=c_optimizer), update


def mmd_gan_repulsive(script, args, data):
    generator = script.Generator(data.shape, args.latent_dim, args.width)
    critic = script.Critic(data.shape, args.feature_dim, args.width, args.sn_gain, args.critic_norm)
    g_optimizer = adam(generator, args.learning_rate, args)
    c_optimizer = adam(critic, args.critic_learning_rate, args)

    def update(step, batches):
        real = next(batches).requires_grad_()
        fake = generator(torch.randn(len(real), args.latent_dim))
        x, y = critic(torch.cat([real, fake])).chunk(2)  # one step of power iteration for both
        mean = lambda a, b, **bound: mean_kernel(a, b, args, True, **bound)  # noqa: E731
        c_loss = args.lam * mean(x, x) - (args.lam - 1) * mean(x, y) - mean(y, y)
        if args.kernel == "rbf-b":  # Eq. (7), lam 1
            c_loss = mean(x, x, bound=lambda d2: d2.clamp(max=4)) - mean(
                y, y, bound=lambda d2: d2.clamp(0.25)
            )
        if args.lambda_gp:
            c_loss = (c_loss - 1) / (1 + args.lambda_gp * norm2(x, real).mean())
        g_loss = mean(x, x) - 2 * mean(x, y) + mean(y, y)
        descend((c_optimizer, c_loss), (g_optimizer, g_loss))

    return dict(generator=generator, critic=critic, g_optimizer=g_optimizer, c_optimizer=c_optimizer), update


def gram_net(script, args, data):
    generator = script.Generator(data.shape, args.latent_dim, args.width)
    critic = script.Critic(data.shape, args.feature_dim, args.width, False)
    g_optimizer = adam(generator, args.learning_rate, args)
    c_optimizer = adam(critic, args.critic_learning_rate, args)

    def k(a, b, s):
        return torch.exp(-(a[:, None] - b[None]).square().sum(2) / (2 * s * s))

    def ratio(denominator, numerator):
        """Eq. (8) at the denominator's points, the mean over the bandwidths."""
        total = 0
        for s in args.bandwidths:
            ridged = k(denominator, denominator, s) + args.ridge * torch.eye(len(denominator))
            total = total + torch.linalg.inv(ridged) @ k(denominator, numerator, s).sum(1)
        return total / len(args.bandwidths)

    def mmd2(x, y):
        return sum((k(x, x, s) - k(x, y, s) - k(y, x, s) + k(y, y, s)).mean() for s in args.bandwidths)

    def update(step, batches):
        real = next(batches)
        fake = generator(torch.rand(len(real), args.latent_dim) * 2 - 1)
        x, y = critic(real), critic(fake)  # apart: each its own batch norm
        if args.as_coded == "notebook":  # alternating
            descend((c_optimizer, -ratio(x, y).mean()))
            descend((g_optimizer, mmd2(critic(real), critic(fake)).sqrt()))
            return
        r = ratio(y, x)
        c_loss = -((r - 1).square().mean() + args.positivity_weight * r.sum())
        if args.positivity == "clip":
            c_loss = -(r.clamp(min=0) - 1).square().mean()
        g_loss = mmd2(x, y)
        descend((c_optimizer, c_loss), (g_optimizer, g_loss.sqrt() if args.as_coded == "julia" else g_loss))

    return dict(generator=generator, critic=critic, g_optimizer=g_optimizer, c_optimizer=c_optimizer), update


class HeavyBall(torch.optim.Optimizer):
    """v = momentum v - lr gradient, weights + v."""

    def step(self):
        (group,) = self.param_groups
        for p in group["params"]:
            if p.grad is not None:
                before = self.state[p].get("velocity", 0 * p.detach())
                self.state[p]["velocity"] = group["momentum"] * before - group["lr"] * p.grad
                p.data = p.data + self.state[p]["velocity"]


def gmmn(script, args, data):
    code = (args.feature_dim,) if args.autoencoder else data.shape
    generator = script.Generator(code, args.latent_dim, args.width, False)
    settings = {"lr": args.learning_rate, "momentum": args.momentum}
    g_optimizer = HeavyBall(generator.parameters(), settings)
    models = dict(generator=generator, g_optimizer=g_optimizer)
    if args.autoencoder:
        autoencoder = script.Autoencoder(data.shape, args.feature_dim, args.width)
        ae_optimizer = HeavyBall(autoencoder.parameters(), {"lr": 0.1, "momentum": 0.0})
        models |= dict(autoencoder=autoencoder, ae_optimizer=ae_optimizer)
        models |= dict(best_autoencoder=copy.deepcopy(autoencoder))

    def encode(x, layers, noise=False, scaled=False):
        """Their outputs; dropped inputs leave the others alone; scaled: weights and biases over 1 - p."""
        for layer in layers:
            p = (0.2, 0.5)[layer]
            x = x * (torch.rand(x.shape) > p) if noise else x
            linear = autoencoder.encoders[layer]
            x = torch.sigmoid((x @ linear.weight.T + linear.bias) / (1 - p if scaled else 1))
        return x

    def reconstruction_loss(x, layers, **how):
        x = encode(x, range(layers[0])).detach()  # what lies below
        y = encode(x, layers, **how)
        for layer in reversed(layers):
            y = torch.sigmoid(autoencoder.decoders[layer](y))
        return -(x * y.log() + (1 - x) * (1 - y).log()).sum(1).mean()

    def train_autoencoder(optimizer, best):
        everything, update = data.images.flatten(1) / 255, 0
        for layers in ((0,), (1,), (0, 1)):
            optimizer.param_groups[0]["momentum"] = 0.5 if len(layers) == 1 else 0.0
            lowest, kept = reconstruction_loss(everything, layers, scaled=True), copy.deepcopy(autoencoder)
            for _ in range(args.ae_steps):
                torch.manual_seed(run.mix(args.seed, 2, update + 1, 0))
                loss = reconstruction_loss(data.batch(update)[:4].flatten(1), layers, noise=True)
                params = [p for k in layers for m in ("encoders", "decoders")
                          for p in getattr(autoencoder, m)[k].parameters()]  # fmt: skip
                grads = torch.autograd.grad(loss, params)
                total = sum(grad.square().sum() for grad in grads).sqrt()
                optimizer.zero_grad()
                for p, grad in zip(params, grads):
                    p.grad = grad * min(1.0, 10 / (total.item() + 1e-6))
                optimizer.step()
                update += 1
            now = reconstruction_loss(everything, layers, scaled=True)  # looked at once, at the end
            if now < lowest:
                lowest, kept = now, autoencoder
            for p, q, b in zip(autoencoder.parameters(), kept.parameters(), best.parameters(), strict=True):
                p.data, b.data = q.data.clone(), q.data.clone()
            for p in autoencoder.encoders[layers[0]].parameters() if len(layers) == 1 else ():
                p.data = p.data / (0.8, 0.5)[layers[0]]
        autoencoder.updates += update
        autoencoder.lowest.copy_(lowest.detach())

    def update(step, batches):
        if args.autoencoder and step == 1:
            train_autoencoder(models["ae_optimizer"], models["best_autoencoder"])
            torch.manual_seed(run.mix(args.seed, 0, 1, 0))
        real = next(batches).flatten(1)
        codes = encode(real, (0, 1)).detach() if args.autoencoder else real
        fake = generator(torch.rand(len(real), args.latent_dim) * 2 - 1).flatten(1)
        if step >= args.drop_step:
            g_optimizer.param_groups[0] |= {"lr": args.learning_rate / 10, "momentum": 0.99}
        descend((g_optimizer, mmd(codes, fake, args)))

    return models, update


def gan(script, args, data):
    generator = script.Generator(data.shape, args.latent_dim, args.width, args.architecture)
    norm = args.critic_norm
    critic = script.Critic(data.shape, args.critic_width, args.architecture, args.weak_critic, norm)
    g_optimizer = adam(generator, args.learning_rate, args)
    c_optimizer = adam(critic, args.critic_learning_rate, args)
    sigmoid = torch.sigmoid

    def update(step, batches):
        real = next(batches)
        fake = generator(torch.randn(len(real), args.latent_dim)).detach()
        a, b = critic(torch.cat([real, fake])).chunk(2)  # in one pass: both see the same weights
        c_loss = -(sigmoid(a).log().mean() + (1 - sigmoid(b)).log().mean())
        if args.loss == "hinge":
            c_loss = (1 - a).clamp_min(0).mean() + (1 + b).clamp_min(0).mean()
        descend((c_optimizer, c_loss))
        b = critic(generator(torch.randn(len(real), args.latent_dim)))
        g_loss = {
            "minimax": (1 - sigmoid(b)).log().mean(),
            "non-saturating": -sigmoid(b).log().mean(),
            "hinge": -b.mean(),
            "boundary-seeking": (b**2).mean() / 2,
        }[args.loss]
        descend((g_optimizer, g_loss))

    return dict(generator=generator, critic=critic, g_optimizer=g_optimizer, c_optimizer=c_optimizer), update


def wgan(script, args, data):
    generator = script.Generator(data.shape, args.latent_dim, args.width)
    critic = script.Critic(data.shape, args.width, args.constraint)
    multiplier = script.Multiplier()
    if args.constraint == "clip":
        g_optimizer = torch.optim.RMSprop(generator.parameters(), args.learning_rate)
        c_optimizer = torch.optim.RMSprop(critic.parameters(), args.critic_learning_rate)
    else:
        g_optimizer = adam(generator, args.learning_rate, args)
        c_optimizer = adam(critic, args.critic_learning_rate, args)

    def update(step, batches):
        for _ in range(args.n_critic):
            if args.constraint == "clip":
                for p in critic.parameters():
                    p.data = p.data.clamp(-args.clip, args.clip)
            real = next(batches).requires_grad_()
            fake = generator(torch.randn(len(real), args.latent_dim)).detach().requires_grad_()
            f_x, f_y = critic(real), critic(fake)
            c_loss = f_y.mean() - f_x.mean()
            if args.constraint == "gradient-penalty":
                u = torch.rand(len(real), 1, 1, 1)
                t = (1 - u) * real + u * fake
                c_loss = c_loss + args.lambda_gp * (norm2(critic(t), t).sqrt() - 1).square().mean()
            if args.constraint == "sobolev":
                omega = (norm2(f_x, real).mean() + norm2(f_y, fake).mean()) / 2
                slack = 1 - omega
                c_loss = c_loss - multiplier.value.clone() * slack + args.rho / 2 * slack**2
            descend((c_optimizer, c_loss))
            if args.constraint == "sobolev":  # the gradient of lambda (1 - Omega) by lambda is 1 - Omega
                multiplier.value -= args.rho * (1 - omega.detach())
        fake = generator(torch.randn(len(real), args.latent_dim))
        descend((g_optimizer, -critic(fake).mean()))

    models = dict(generator=generator, critic=critic, g_optimizer=g_optimizer, c_optimizer=c_optimizer)
    return models | {"multiplier": multiplier}, update


GAMES = {game.__name__: game for game in (smmd_gan, mmd_gan, gamn, mmd_gan_repulsive, gram_net, gmmn)}
GAMES |= {"baselines.gan": gan, "baselines.wgan": wgan}

CASES = [
    ("smmd_gan", dict(feature_dim=2)),
    ("smmd_gan", dict(scale_form="poster", clip_norm=1e-4)),
    ("smmd_gan", dict(constraint="swgan")),
    ("smmd_gan", dict(constraint="none", critic_norm="pim", clip_norm=0.0, kernel="rq")),
    ("smmd_gan", dict(constraint="gradient-penalty", kernel="rbf", feature_dim=3)),
    ("mmd_gan", {}),
    ("mmd_gan", dict(lambda_ae=0.0, lambda_rank=2.0, kernel="rq")),
    ("gamn", dict(gp_target=0.5)),
    ("gamn", dict(regularizer="l1", data_mmd_weight=0.5, kernel="rq")),
    ("gamn", dict(regularizer="weight-decay", n_critic=1, n_generator=2, total_steps=3)),
    ("mmd_gan_repulsive", dict(kernel="rbf-b")),
    ("mmd_gan_repulsive", dict(lam=-1.0, lambda_gp=0.1, critic_norm="none", feature_dim=2)),
    ("gram_net", {}),
    ("gram_net", dict(positivity="clip")),
    ("gram_net", dict(as_coded="notebook")),
    ("gram_net", dict(as_coded="julia")),
    ("baselines.gan", {}),
    ("baselines.gan", dict(loss="minimax", critic_norm="pim")),
    ("baselines.gan", dict(loss="hinge", critic_width=3)),
    ("baselines.gan", dict(loss="boundary-seeking")),
    ("baselines.wgan", dict(lambda_gp=3.0)),
    ("baselines.wgan", dict(constraint="clip", clip=0.1, image_size=16)),
    ("baselines.wgan", dict(constraint="sobolev", rho=0.5)),
    ("gmmn", dict(drop_step=2, kernel="rq")),
    ("gmmn", dict(autoencoder=True, ae_steps=2, drop_step=2)),
]
OPTIONS = dict(total_steps=2, batch_size=6, eval_every=0, device="cpu", ema_decay=0.25)
METHOD = {
    "smmd_gan": dict(width=4, latent_dim=3, warmup_critic=2, bandwidths=(0.1, 0.3)),
    "mmd_gan": dict(width=4, image_size=16, warmup_critic=2, clip=0.1, bandwidths=(0.01, 0.1)),
    "gamn": dict(width=4, latent_dim=3, n_critic=2, bandwidths=(0.1, 1.0)),
    "mmd_gan_repulsive": dict(width=4, latent_dim=3),
    "gram_net": dict(width=4, latent_dim=3, image_size=16),
    "gmmn": dict(width=16, latent_dim=3, image_size=32),
    "baselines.gan": dict(width=4, latent_dim=3),
    "baselines.wgan": dict(width=4, latent_dim=3, n_critic=2),
}


def content(model):
    """Its state, and a network's gradients."""
    grads = [p.grad for p in model.parameters()] if isinstance(model, nn.Module) else []
    return {"state": model.state_dict(), "grads": grads}


@pytest.mark.parametrize("layout", ["contiguous", pytest.param("channels last", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_updates_by_hand(name, options, layout, tmp_path, monkeypatch):
    script = import_module(name)
    if layout == "channels last":  # as on a GPU
        prepare = run.prepare
        monkeypatch.setattr(run, "prepare", lambda models, device: prepare(models, torch.device("cuda")))
    monkeypatch.setattr(script, "draw_picture", lambda path, *_: Image.new("RGB", (1, 1)).save(path))
    monkeypatch.setattr(script, "AE_BATCH", 4, raising=False)
    if name == "smmd_gan":  # its own small weights make features so small that every penalty is a constant
        monkeypatch.setattr(script, "initialise", lambda module: None)
    side, seed = (METHOD[name] | options).get("image_size", 8), torch.Generator().manual_seed(0)
    images = torch.randint(256, (24, 1, side, side), generator=seed, dtype=torch.uint8)
    monkeypatch.setattr(datasets, "load_images", lambda *_: images)
    trained = {}
    monkeypatch.setattr(run, "save_checkpoint", lambda *given: trained.update(given[4]))
    args = script.Args(**OPTIONS | METHOD[name] | options, runs_dir=str(tmp_path))
    script.train(args)

    args = script.resolve(args)
    data = datasets.load(args, "train", script.VALUE_RANGE, torch.device("cpu"), 0, 1)
    torch.manual_seed(args.seed)
    models, update = GAMES[name](script, args, data)
    batches = map(data.batch, itertools.count())
    averages = {key: p.detach().clone() for key, p in models["generator"].named_parameters()}
    for step in range(1, args.total_steps + 1):
        torch.manual_seed(run.mix(args.seed, 0, step, 0))
        update(step, batches)
        weights = {key: p.detach().clone() for key, p in models["generator"].named_parameters()}
        decay = {1: 2 / 11, 2: 0.25, 3: 0.25}[step]  # of 0.25; the third would be 4 / 13
        averages = {key: decay * averages[key] + (1 - decay) * weight for key, weight in weights.items()}

    ema = trained.pop("ema").state_dict()
    trained.pop("data")
    assert set(trained) - {"lr_schedule"} == set(models)
    for key, average in averages.items():
        torch.testing.assert_close(ema[key], average, rtol=1e-7, atol=1e-8)
    for part, model in models.items():
        # Adam makes 1e-9 of the rounding in a gradient that is 0, such as that of the critic's last bias.
        floor = 1e-11 if part.endswith("optimizer") else 1e-7  # a step is about 1e-3
        (got, _), (wanted, _) = (tree_flatten_with_path(content(m)) for m in (trained[part], model))
        for (where, a), (_, b) in zip(got, wanted, strict=True):
            a, b = (torch.as_tensor(0.0 if value is None else value).double() for value in (a, b))
            close = (a - b).abs() <= 1e-7 * b.abs().max() + floor if b.numel() else torch.tensor(True)
            assert close.all(), f"{part}{keystr(where)}: {a.tolist()}, expected {b.tolist()}"


def test_momentum_of_the_auto_encoders_training():
    """Each layer 0.5; the whole 0, from its 50th update 0.5, from its 200th 0.9."""
    script = import_module("gmmn")
    found = [script.autoencoder_momentum(*script.part_of_training(update, 300)) for update in range(1, 901)]
    assert found == [0.5] * 600 + [0.0] * 49 + [0.5] * 150 + [0.9] * 101
