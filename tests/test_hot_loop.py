"""What makes a step slow: asking for a number, a broken graph, convolutions that the update does not need."""

from importlib import import_module

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from common import run

SMALL = ["--width", "16", "--batch-size", "16", "--total-steps", "3", "--log-every", "0"]
SMALL += ["--sample-every", "0", "--eval-every", "0", "--save-every", "0", "--ema-decay", "0.9"]
CASES = [
    "gmmn", "gmmn --dataset swissroll", "gamn --n-critic 2", "gamn --regularizer l1 --data-mmd-weight 1",
    "mmd_gan --warmup-critic 2", "mmd_gan_repulsive --kernel rbf-b", "mmd_gan_repulsive --lambda-gp 0.1",
    "smmd_gan --warmup-critic 2", "smmd_gan --warmup-critic 2 --constraint gradient-penalty",
    "smmd_gan --warmup-critic 2 --constraint swgan", "gram_net", "gram_net --as-coded notebook",
    "baselines.gan --critic-norm pim", "baselines.wgan --n-critic 2", "baselines.wgan --constraint sobolev",
]  # fmt: skip


class Watch(TorchDispatchMode):
    """Notes every number that is read from a tensor while it is on."""

    def __init__(self):
        super().__init__()
        self.on, self.seen, self.operations = False, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += self.on
        if self.on and function is torch.ops.aten._local_scalar_dense.default:
            self.seen.append(str(function))
        return function(*args, **kwargs or {})


def watched(case, tmp_path, monkeypatch):
    """Train three steps, and watch the second: the operations of its loop, and what in it waits."""
    script, *options = case.split()
    module, watch, mix = import_module(script), Watch(), run.mix

    def at_the_top_of_a_step(*numbers):
        if numbers[1] == 0:
            watch.on = numbers[2] == 2
        return mix(*numbers)

    def noting(name, method):
        return lambda self, *args, **kwargs: (
            watch.seen.append(name) if watch.on else None,
            method(self, *args, **kwargs),
        )[1]

    def unwatched(step):
        def stepping(self, *args):  # optimisers count their steps in tensors on the CPU
            before, watch.on = watch.on, False
            step(self, *args)
            watch.on = before

        return stepping

    monkeypatch.setattr(run, "mix", at_the_top_of_a_step)
    for name in ("cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
    for optimizer in (torch.optim.Adam, torch.optim.RMSprop, torch.optim.SGD):
        monkeypatch.setattr(optimizer, "step", unwatched(optimizer.step))
    with watch:
        module.train(run.parse(module.Args, [*SMALL, *options, "--runs-dir", str(tmp_path)]))
    return watch


@pytest.mark.parametrize("case", CASES)
def test_a_step_asks_for_no_number(case, tmp_path, monkeypatch):
    watch = watched(case, tmp_path, monkeypatch)
    assert watch.operations > 50
    assert watch.seen == []


def test_the_watch_sees_what_waits(tmp_path, monkeypatch):
    module = import_module("mmd_gan_repulsive")
    loss = module.critic_loss
    monkeypatch.setattr(module, "critic_loss", lambda *args: loss(*args) * (1 if loss(*args) > 0 else 1.0))
    assert watched("mmd_gan_repulsive", tmp_path, monkeypatch).seen


def networks(script, dataset):
    module = import_module(script)
    args = module.resolve(module.Args(dataset=dataset, width=16))
    shape = (1, 8, 8) if dataset == "digits" else (2,)
    if script == "gmmn":
        return module, args, shape, module.Generator(shape, args.latent_dim, 16, dataset != "digits"), None
    if script.startswith("baselines."):
        return module, args, shape, *module.make_networks(args, shape, torch.device("cpu"))
    generator = module.Generator(shape, args.latent_dim, 16)
    method = {
        "mmd_gan": (False, False),
        "mmd_gan_repulsive": (args.sn_gain, "pico") if script == "mmd_gan_repulsive" else (),
        "gram_net": (False,),
    }
    critic = module.Critic(shape, args.feature_dim, 16, *method.get(script, ()))
    if script == "smmd_gan":
        module.normalise(critic, "pim", True)
    return module, args, shape, generator, critic


@pytest.mark.parametrize("dataset", ["digits", pytest.param("8gaussians", marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", sorted({case.split()[0] for case in CASES}))
def test_networks_compile_without_a_break(script, dataset):
    """Forward and backward in one graph, and the same numbers; autograd's eager backend, so no compiler."""
    module, args, shape, generator, critic = networks(script, dataset)
    noise = module.draw_noise(4, args, torch.device("cpu"))
    for network, x in ((generator, noise), (critic, torch.rand(4, *shape))):
        if network is None:
            continue
        torch._dynamo.reset()
        state = {name: value.clone() for name, value in network.state_dict().items()}
        plain = network(x)
        network.load_state_dict(state)
        compiled = torch.compile(network, backend="eager", fullgraph=True)(x)
        plain, compiled = (out[-1] if isinstance(out, list) else out for out in (plain, compiled))
        torch.testing.assert_close(compiled, plain)
        compiled.sum().backward()
        assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_power_iteration_moves_once_in_compiled_networks_too():
    """Two forwards that share their normalised weights: what is cached for the first serves the second."""
    module, _, shape, _, critic = networks("mmd_gan_repulsive", "digits")
    real, fake = torch.rand(2, 4, *shape)
    state = {name: value.clone() for name, value in critic.state_dict().items()}
    outcomes = []
    for compiled in (False, True):
        torch._dynamo.reset()
        critic.load_state_dict(state)
        network = torch.compile(critic, backend="eager") if compiled else critic
        with nn.utils.parametrize.cached():
            feat = torch.cat([network(real), network(fake)])
        vectors = [part.v.clone() for part in critic.modules() if isinstance(part, module.SpectralNorm)]
        outcomes.append([feat.detach(), *vectors])
    for plain, compiled in zip(*outcomes):
        torch.testing.assert_close(compiled, plain)


# --- convolutions that are called, and those that an update needs -----------------------------------


class Costs:
    """Multiplications and additions in the layers of a network, of a batch x.

    forward: of a forward pass, as much as the gradients of all weights take, or those of all layers' inputs.
    inner: of the gradients of all inputs but the first layer's, which no update of this network asks for.
    """

    def __init__(self, network, x, kinds):
        costs = []

        def note(layer, given, out):
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                positions = out.numel() // layer.weight.shape[0]
            else:  # a transposed convolution is the adjoint of one: its input takes the output's part
                positions = given[0].numel() // layer.weight.shape[0]
            costs.append(2 * positions * layer.weight.numel() * isinstance(layer, kinds))

        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                layer.register_forward_hook(note)
        network(x)
        self.forward = sum(costs)
        self.inner = self.forward - costs[0]


CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
BATCH = 12


def alternating(g, c, n_critic):
    """The critic n_critic times, by generated images that are constants; then the generator."""
    critic = g.forward + 2 * c.forward + 2 * (c.forward + c.inner)
    return n_critic * critic + g.forward + 2 * c.forward + c.forward + g.forward + g.inner


def simultaneous(g, c):
    """Gradients of the critic by real and fake, of the generator through the critic of fake alone."""
    critic = 2 * (c.forward + c.inner)
    return g.forward + 2 * c.forward + critic + c.forward + g.forward + g.inner


NEEDED = {
    # And of the loss, which here is one of 8x8 pixels, the three blocks of products.
    "gmmn": lambda g, c, d: g.forward + g.forward + g.inner + 3 * 2 * BATCH**2 * 64,
    "gamn --n-critic 2 --regularizer l2": lambda g, c, d: alternating(g, c, 2),
    # In each update of the critic the decoder has two passes, whose gradient goes on to the encoder.
    "mmd_gan --warmup-critic 2": lambda g, c, d: alternating(g, c, 2) + 2 * 2 * 3 * d.forward,
    "mmd_gan --warmup-critic 2 --lambda-ae 0": lambda g, c, d: alternating(g, c, 2),
    # PICO: there and back, the norm, and its gradient by the weight, each of one image.
    "mmd_gan_repulsive": lambda g, c, d: simultaneous(g, c) + 4 * c.forward // BATCH,
    "mmd_gan_repulsive --critic-norm pim": lambda g, c, d: simultaneous(g, c),
    "mmd_gan_repulsive --loss hinge --critic-norm pim": lambda g, c, d: simultaneous(g, c),
    "smmd_gan --warmup-critic 2 --constraint none": lambda g, c, d: alternating(g, c, 2),
    "gram_net": lambda g, c, d: simultaneous(g, c),
    # Their generators' losses have no real samples.
    "baselines.gan": lambda g, c, d: alternating(g, c, 1) - c.forward,
    "baselines.wgan --n-critic 2 --constraint clip": lambda g, c, d: alternating(g, c, 2) - c.forward,
}


def called(script, options, steps, folder):
    """Return what train calls in so many steps, by torch's counter: convolutions, or in gmmn.py products."""
    operations = ("convolution", "convolution_backward") if script != "gmmn" else ("mm", "addmm")
    module = import_module(script)
    options = [*SMALL, *options, "--batch-size", str(BATCH), "--total-steps", str(steps)]
    with FlopCounterMode(display=False) as counter:
        module.train(run.parse(module.Args, [*options, "--runs-dir", str(folder / str(steps))]))
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if operation.__name__ in operations)


@pytest.mark.parametrize("case", NEEDED)
def test_every_convolution_that_is_called_is_needed(case, tmp_path):
    script, *options = case.split()
    module, args, shape, generator, critic = networks(script, "digits")
    kinds = CONVOLUTIONS if script != "gmmn" else (nn.Linear,)
    g = Costs(generator, module.draw_noise(BATCH, args, torch.device("cpu")), kinds)
    c = Costs(critic, torch.rand(BATCH, *shape), kinds) if critic else None
    d = None
    if script == "mmd_gan":
        d = Costs(module.Decoder(shape, args.feature_dim, 16), torch.rand(BATCH, args.feature_dim), kinds)
    # A second step, so that what is made once and the picture at the end cancel.
    assert called(script, options, 2, tmp_path) - called(script, options, 1, tmp_path) == NEEDED[case](
        g, c, d
    )
