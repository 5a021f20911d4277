"""What makes a GPU wait: no step asks for a number, no compiled network breaks its graph."""

from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import run

SMALL = ["--width", "16", "--batch-size", "16", "--total-steps", "3", "--log-every", "0"]
SMALL += ["--sample-every", "0", "--eval-every", "0", "--save-every", "0", "--ema-decay", "0.9"]
CASES = [
    "gmmn", "gmmn --dataset swissroll", "gamn --n-critic 2", "gamn --regularizer l1 --data-mmd-weight 1",
    "mmd_gan --warmup-critic 2", "mmd_gan_repulsive --kernel rbf-b", "mmd_gan_repulsive --lambda-gp 0.1",
    "smmd_gan --warmup-critic 2", "smmd_gan --warmup-critic 2 --constraint gradient-penalty",
    "smmd_gan --warmup-critic 2 --constraint swgan", "gram_net", "gram_net --as-coded notebook",
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
