"""Networks and settings, written out from the papers and from their authors' code, not from ours.

A table has one line for each operation of a forward pass, in the order in which they are made. Behind the bar
is the law of its initial weights and of its biases or shifts, which is measured on them: `normal S` has
standard deviation S around 0, `normal 1 S` around 1, `uniform B` lies in [-B, B], `truncated S` is normal and
cut at 2 S, and a number is that number. `conv 3-64 4x4 stride 2 pad 1` has 3 channels of input, 64 of output.

Layers, laws and numbers of parameters are those of Li et al. 2017 and their code; Wang et al. 2019, Tables S1
and S2, and their code; Arbel et al. 2018's code; Srivastava et al. 2020, Tables 3, 5, 6, 7, and Julia code.
Those of GAMN are from the code of Gulrajani et al. 2017 ([C:IW]), on which its paper builds.
"""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

import gamn
import gmmn
import gram_net
import mmd_gan
import mmd_gan_repulsive
import smmd_gan

RESHAPING = {"dim", "flatten", "unflatten", "add_", "size"}  # add_: the counter of batch norm


class Operations(TorchFunctionMode):
    """While it is on, notes what is called on tensors: lines of text, with the weights that each has."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.__name__
        if name in DESCRIPTIONS:
            self.lines += DESCRIPTIONS[name](*args, **kwargs)
        elif name not in RESHAPING:
            self.lines.append((name, []))
        return result


def linear(x, weight, bias=None):
    line = f"linear {weight.shape[1]}-{weight.shape[0]}"
    return [(line + " no bias" * (bias is None), [weight, bias])]


def conv(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    c_out, c_in, height, width = weight.shape
    line = f"conv {c_in}-{c_out} {height}x{width} stride {stride[0]} pad {padding[0]}"
    return [(line + " no bias" * (bias is None), [weight, bias])]


def deconv(x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    c_in, c_out, height, width = weight.shape
    line = f"deconv {c_in}-{c_out} {height}x{width} stride {stride[0]} pad {padding[0]}"
    line += f" out {output_padding[0]}" if output_padding[0] else ""
    return [(line + " no bias" * (bias is None), [weight, bias])]


def batch_norm(x, mean, variance, weight, bias, training, momentum, eps):
    assert training
    return [(f"batch norm {len(mean)} eps {eps:g} momentum {momentum:g}", [weight, bias])]


def layer_norm(x, groups, weight, bias, eps):
    assert groups == 1
    return [(f"layer norm {len(weight)} eps {eps:g}", [weight, bias])]


def interpolate(x, size=None, scale_factor=None, mode="nearest", **rest):
    return [(f"{mode} x {scale_factor:g}", [])]


DESCRIPTIONS = {
    "linear": linear,
    "conv2d": conv,
    "conv_transpose2d": deconv,
    "batch_norm": batch_norm,
    "group_norm": layer_norm,
    "avg_pool2d": lambda x, size: [(f"mean pool {size}", [])],
    "max_pool2d": lambda x, size, **rest: [(f"max pool {size}", [])],
    "interpolate": interpolate,
    "sum": lambda x, dims: [("sum over space", [])],
    "relu": lambda x, inplace: [("relu", [])],
    "leaky_relu": lambda x, negative_slope, inplace: [(f"leaky relu {negative_slope:g}", [])],
    "pad": lambda x, sides, mode, value: [("pad " + " ".join(map(str, sides)), [])],
}


def check_law(values, law, where):
    """Assert that values are as if drawn from the law, to five standard errors of three statistics."""
    kind, *numbers = law.split()
    if not numbers:
        assert (values == float(kind)).all(), (where, law)
        return
    *mean, size = map(float, numbers)
    values = values.detach().double().flatten() - (mean[0] if mean else 0.0)
    largest = values.abs().max().item()
    # The standard deviation, and the share of values that are nearer to the mean than that.
    if kind == "normal":
        std, share = size, math.erf(0.5**0.5)
    elif kind == "uniform":
        std, share = size / 3**0.5, 1 / 3**0.5
        assert largest <= size * 1.0001, (where, law, largest)
    elif kind == "truncated":
        std = 0.87962566 * size
        share = math.erf(0.87962566 * 0.5**0.5) / math.erf(2**0.5)
        assert largest <= 2 * size * 1.0001, (where, law, largest)
    z = values[:: math.ceil(len(values) / 200_000)] / std  # some of them are enough
    error = 5 * len(z) ** -0.5
    assert abs(z.mean().item()) < error, (where, law)
    assert abs(z.square().mean().item() - 1) < 2**0.5 * error + 1e-3, (where, law, values.std().item())
    assert abs((z.abs() < 1).double().mean().item() - share) < 0.5 * error, (where, law)


def check_network(network, shape, table):
    """Compare a network, given an input of this shape, with a table whose first line is its parameters."""
    first, *lines = (line.strip() for line in table.strip().splitlines())
    assert sum(p.numel() for p in network.parameters()) == int(first.removesuffix(" parameters"))
    inputs = torch.zeros(2, *shape)
    with torch.no_grad(), Operations() as operations:
        network(inputs)
    wanted = [line.partition("|")[0].strip() for line in lines]
    assert [line for line, _ in operations.lines] == wanted
    seen = set()
    for line, (_, tensors) in zip(lines, operations.lines):
        laws = [law.strip() for law in line.partition("|")[2].split(",") if law.strip()]
        for tensor, law in zip([t for t in tensors if t is not None], laws, strict=True):
            check_law(tensor, law, line)
            seen.add(id(tensor))
    assert seen == {id(p) for p in network.parameters()}, "a parameter that no operation has"


class Reconstruction(torch.nn.Module):
    """Images -> their reconstruction by an auto-encoder."""

    def __init__(self, autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x):
        return self.autoencoder.decode(self.autoencoder.encode(x))


NETWORKS = {}  # name: (function that makes it, shape of its input, table)

# --- gmmn.py: [C:GMMN], normal laws of variance 1 / fan_in --------------------------------------------

NETWORKS["gmmn generator, mnist"] = (
    lambda: gmmn.Generator((1, 28, 28), 10, 1024, False),
    (10,),
    """
    1149904 parameters
    linear 10-64     | normal 0.316228, 0
    relu
    linear 64-256    | normal 0.125, 0
    relu
    linear 256-256   | normal 0.0625, 0
    relu
    linear 256-1024  | normal 0.0625, 0
    relu
    linear 1024-784  | normal 0.03125, 0
    sigmoid
    """,
)
NETWORKS["gmmn generator of codes, mnist"] = (
    lambda: gmmn.Generator((32,), 10, 1024, False),
    (10,),
    """
    379104 parameters
    linear 10-64     | normal 0.316228, 0
    relu
    linear 64-256    | normal 0.125, 0
    relu
    linear 256-256   | normal 0.0625, 0
    relu
    linear 256-1024  | normal 0.0625, 0
    relu
    linear 1024-32   | normal 0.03125, 0
    sigmoid
    """,
)
NETWORKS["gmmn auto-encoder, mnist"] = (
    lambda: Reconstruction(gmmn.Autoencoder((1, 28, 28), 32, 1024)),
    (1, 28, 28),
    """
    1674032 parameters
    linear 784-1024  | normal 0.035714, 0
    sigmoid
    linear 1024-32   | normal 0.03125, 0
    sigmoid
    linear 32-1024   | normal 0.176777, 0
    sigmoid
    linear 1024-784  | normal 0.03125, 0
    sigmoid
    """,
)

# --- gamn.py: [C:IW], uniform laws; on toys PyTorch's biases -------------------------------------------

NETWORKS["gamn generator, cifar10"] = (
    lambda: gamn.Generator((3, 32, 32), 128, 128),
    (128,),
    """
    5179907 parameters
    linear 128-8192                          | uniform 0.026854, 0
    batch norm 8192 eps 1e-05 momentum 0.1   | 1, 0
    relu
    deconv 512-256 5x5 stride 2 pad 1        | uniform 0.035355, 0
    pad 0 -1 0 -1
    batch norm 256 eps 1e-05 momentum 0.1    | 1, 0
    relu
    deconv 256-128 5x5 stride 2 pad 1        | uniform 0.05, 0
    pad 0 -1 0 -1
    batch norm 128 eps 1e-05 momentum 0.1    | 1, 0
    relu
    deconv 128-3 5x5 stride 2 pad 1          | uniform 0.117108, 0
    pad 0 -1 0 -1
    tanh
    """,
)
NETWORKS["gamn mapper, cifar10"] = (
    lambda: gamn.Critic((3, 32, 32), 10, 128),
    (3, 32, 32),
    """
    4189962 parameters
    pad 1 2 1 2
    conv 3-128 5x5 stride 2 pad 0            | uniform 0.117108, 0
    leaky relu 0.2
    pad 1 2 1 2
    conv 128-256 5x5 stride 2 pad 0          | uniform 0.05, 0
    layer norm 256 eps 1e-05                 | 1, 0
    leaky relu 0.2
    pad 1 2 1 2
    conv 256-512 5x5 stride 2 pad 0          | uniform 0.035355, 0
    layer norm 512 eps 1e-05                 | 1, 0
    leaky relu 0.2
    linear 8192-10                           | uniform 0.027047, 0
    """,
)
NETWORKS["gamn generator, mnist"] = (
    lambda: gamn.Generator((1, 28, 28), 128, 64),
    (128,),
    """
    1562753 parameters
    linear 128-4096                          | uniform 0.037689, 0
    batch norm 4096 eps 1e-05 momentum 0.1   | 1, 0
    relu
    deconv 256-128 5x5 stride 2 pad 1        | uniform 0.05, 0
    pad 0 -2 0 -2
    batch norm 128 eps 1e-05 momentum 0.1    | 1, 0
    relu
    deconv 128-64 5x5 stride 2 pad 1         | uniform 0.070711, 0
    pad 0 -1 0 -1
    batch norm 64 eps 1e-05 momentum 0.1     | 1, 0
    relu
    deconv 64-1 5x5 stride 2 pad 1           | uniform 0.168034, 0
    pad 0 -1 0 -1
    tanh
    """,
)
NETWORKS["gamn mapper, mnist"] = (
    lambda: gamn.Critic((1, 28, 28), 10, 64),
    (1, 28, 28),
    """
    1067786 parameters
    pad 1 2 1 2
    conv 1-64 5x5 stride 2 pad 0             | uniform 0.168034, 0
    leaky relu 0.2
    pad 1 2 1 2
    conv 64-128 5x5 stride 2 pad 0           | uniform 0.070711, 0
    layer norm 128 eps 1e-05                 | 1, 0
    leaky relu 0.2
    pad 2 2 2 2
    conv 128-256 5x5 stride 2 pad 0          | uniform 0.05, 0
    layer norm 256 eps 1e-05                 | 1, 0
    leaky relu 0.2
    linear 4096-10                           | uniform 0.038227, 0
    """,
)
NETWORKS["gamn generator, 64x64"] = (
    lambda: gamn.Generator((3, 64, 64), 128, 64),
    (128,),
    """
    5364739 parameters
    linear 128-8192                          | uniform 0.034641, 0
    batch norm 512 eps 1e-05 momentum 0.1    | 1, 0
    relu
    deconv 512-256 5x5 stride 2 pad 1        | uniform 0.034641, 0
    pad 0 -1 0 -1
    batch norm 256 eps 1e-05 momentum 0.1    | 1, 0
    relu
    deconv 256-128 5x5 stride 2 pad 1        | uniform 0.034641, 0
    pad 0 -1 0 -1
    batch norm 128 eps 1e-05 momentum 0.1    | 1, 0
    relu
    deconv 128-64 5x5 stride 2 pad 1         | uniform 0.034641, 0
    pad 0 -1 0 -1
    batch norm 64 eps 1e-05 momentum 0.1     | 1, 0
    relu
    deconv 64-3 5x5 stride 2 pad 1           | uniform 0.034641, 0
    pad 0 -1 0 -1
    tanh
    """,
)
NETWORKS["gamn mapper, 64x64"] = (
    lambda: gamn.Critic((3, 64, 64), 10, 64),
    (3, 64, 64),
    """
    4390282 parameters
    pad 1 2 1 2
    conv 3-64 5x5 stride 2 pad 0             | uniform 0.034641, 0
    leaky relu 0.2
    pad 1 2 1 2
    conv 64-128 5x5 stride 2 pad 0           | uniform 0.034641, 0
    layer norm 128 eps 1e-05                 | 1, 0
    leaky relu 0.2
    pad 1 2 1 2
    conv 128-256 5x5 stride 2 pad 0          | uniform 0.034641, 0
    layer norm 256 eps 1e-05                 | 1, 0
    leaky relu 0.2
    pad 1 2 1 2
    conv 256-512 5x5 stride 2 pad 0          | uniform 0.034641, 0
    layer norm 512 eps 1e-05                 | 1, 0
    leaky relu 0.2
    linear 8192-10                           | uniform 0.034641, 0
    """,
)
NETWORKS["gamn generator, toys"] = (
    lambda: gamn.Generator((2,), 2, 512),
    (2,),
    """
    527874 parameters
    linear 2-512                             | uniform 1.732051, uniform 0.707107
    relu
    linear 512-512                           | uniform 0.108253, uniform 0.044194
    relu
    linear 512-512                           | uniform 0.108253, uniform 0.044194
    relu
    linear 512-2                             | uniform 0.108042, uniform 0.044194
    """,
)
NETWORKS["gamn mapper, toys"] = (
    lambda: gamn.Critic((2,), 10, 512),
    (2,),
    """
    535050 parameters
    linear 2-512                             | uniform 1.732051, uniform 0.707107
    layer norm 512 eps 1e-05                 | 1, 0
    relu
    linear 512-512                           | uniform 0.108253, uniform 0.044194
    layer norm 512 eps 1e-05                 | 1, 0
    relu
    linear 512-512                           | uniform 0.108253, uniform 0.044194
    layer norm 512 eps 1e-05                 | 1, 0
    relu
    linear 512-10                            | uniform 0.107211, uniform 0.044194
    """,
)

# --- mmd_gan.py: networks of [C:Li] ------------------------------------------------------------------

NETWORKS["mmd_gan generator, cifar10"] = (
    lambda: mmd_gan.Generator((3, 32, 32), 128, 64),
    (128,),
    """
    1183616 parameters
    deconv 128-256 4x4 stride 1 pad 0 no bias  | normal 0.02
    batch norm 256 eps 1e-05 momentum 0.1      | normal 1 0.02, 0
    relu
    deconv 256-128 4x4 stride 2 pad 1 no bias  | normal 0.02
    batch norm 128 eps 1e-05 momentum 0.1      | normal 1 0.02, 0
    relu
    deconv 128-64 4x4 stride 2 pad 1 no bias   | normal 0.02
    batch norm 64 eps 1e-05 momentum 0.1       | normal 1 0.02, 0
    relu
    deconv 64-3 4x4 stride 2 pad 1 no bias     | normal 0.02
    tanh
    """,
)
NETWORKS["mmd_gan critic, cifar10"] = (
    lambda: mmd_gan.Critic((3, 32, 32), 128, 64, False, False),
    (3, 32, 32),
    """
    1183488 parameters
    conv 3-64 4x4 stride 2 pad 1 no bias       | normal 0.02
    leaky relu 0.2
    conv 64-128 4x4 stride 2 pad 1 no bias     | normal 0.02
    batch norm 128 eps 1e-05 momentum 0.1      | normal 1 0.02, 0
    leaky relu 0.2
    conv 128-256 4x4 stride 2 pad 1 no bias    | normal 0.02
    batch norm 256 eps 1e-05 momentum 0.1      | normal 1 0.02, 0
    leaky relu 0.2
    conv 256-128 4x4 stride 1 pad 0 no bias    | normal 0.02
    """,
)
NETWORKS["mmd_gan decoder, mnist"] = (
    lambda: mmd_gan.Decoder((1, 32, 32), 10, 64),
    (10,),
    """
    698240 parameters
    deconv 10-256 4x4 stride 1 pad 0 no bias   | normal 0.02
    batch norm 256 eps 1e-05 momentum 0.1      | normal 1 0.02, 0
    relu
    deconv 256-128 4x4 stride 2 pad 1 no bias  | normal 0.02
    batch norm 128 eps 1e-05 momentum 0.1      | normal 1 0.02, 0
    relu
    deconv 128-64 4x4 stride 2 pad 1 no bias   | normal 0.02
    batch norm 64 eps 1e-05 momentum 0.1       | normal 1 0.02, 0
    relu
    deconv 64-1 4x4 stride 2 pad 1 no bias     | normal 0.02
    tanh
    """,
)
NETWORKS["mmd_gan generator, celeba"] = (
    lambda: mmd_gan.Generator((3, 64, 64), 64, 64),
    (64,),
    """
    3281792 parameters
    deconv 64-512 4x4 stride 1 pad 0 no bias   | normal 0.02
    batch norm 512 eps 1e-05 momentum 0.1      | normal 1 0.02, 0
    relu
    deconv 512-256 4x4 stride 2 pad 1 no bias  | normal 0.02
    batch norm 256 eps 1e-05 momentum 0.1      | normal 1 0.02, 0
    relu
    deconv 256-128 4x4 stride 2 pad 1 no bias  | normal 0.02
    batch norm 128 eps 1e-05 momentum 0.1      | normal 1 0.02, 0
    relu
    deconv 128-64 4x4 stride 2 pad 1 no bias   | normal 0.02
    batch norm 64 eps 1e-05 momentum 0.1       | normal 1 0.02, 0
    relu
    deconv 64-3 4x4 stride 2 pad 1 no bias     | normal 0.02
    tanh
    """,
)
NETWORKS["mmd_gan critic, celeba"] = (
    lambda: mmd_gan.Critic((3, 64, 64), 64, 64, False, False),
    (3, 64, 64),
    """
    3281664 parameters
    conv 3-64 4x4 stride 2 pad 1 no bias       | normal 0.02
    leaky relu 0.2
    conv 64-128 4x4 stride 2 pad 1 no bias     | normal 0.02
    batch norm 128 eps 1e-05 momentum 0.1      | normal 1 0.02, 0
    leaky relu 0.2
    conv 128-256 4x4 stride 2 pad 1 no bias    | normal 0.02
    batch norm 256 eps 1e-05 momentum 0.1      | normal 1 0.02, 0
    leaky relu 0.2
    conv 256-512 4x4 stride 2 pad 1 no bias    | normal 0.02
    batch norm 512 eps 1e-05 momentum 0.1      | normal 1 0.02, 0
    leaky relu 0.2
    conv 512-64 4x4 stride 1 pad 0 no bias     | normal 0.02
    """,
)
NETWORKS["mmd_gan weak critic of the GRAM paper, cifar10"] = (
    lambda: mmd_gan.Critic((3, 32, 32), 128, 32, True, True),
    (3, 32, 32),
    """
    182016 parameters
    conv 3-32 4x4 stride 2 pad 1 no bias       | normal 0.02
    batch norm 32 eps 1e-05 momentum 0.1       | normal 1 0.02, 0
    leaky relu 0.2
    conv 32-32 4x4 stride 2 pad 1 no bias      | normal 0.02
    batch norm 32 eps 1e-05 momentum 0.1       | normal 1 0.02, 0
    leaky relu 0.2
    conv 32-64 4x4 stride 2 pad 1 no bias      | normal 0.02
    batch norm 64 eps 1e-05 momentum 0.1       | normal 1 0.02, 0
    leaky relu 0.2
    conv 64-128 4x4 stride 1 pad 0 no bias     | normal 0.02
    """,
)
NETWORKS["mmd_gan critic, toys"] = (  # ours, with PyTorch's initial weights
    lambda: mmd_gan.Critic((2,), 16, 256, False, False),
    (2,),
    """
    136464 parameters
    linear 2-256    | uniform 0.7071, uniform 0.7071
    relu
    linear 256-256  | uniform 0.0625, uniform 0.0625
    relu
    linear 256-256  | uniform 0.0625, uniform 0.0625
    relu
    linear 256-16   | uniform 0.0625, uniform 0.0625
    """,
)

# --- mmd_gan_repulsive.py: Tables S1 and S2; He's laws, of slope 0.1 and 0, and Glorot's

NETWORKS["mmd_gan_repulsive generator, cifar10"] = (
    lambda: mmd_gan_repulsive.Generator((3, 32, 32), 128, 64),
    (128,),
    """
    3811907 parameters
    linear 128-8192                            | uniform 0.026854, truncated 1e-05
    deconv 512-256 4x4 stride 2 pad 1 no bias  | truncated 0.022097
    batch norm 256 eps 0.001 momentum 0.01     | 1, 0
    relu
    deconv 256-128 4x4 stride 2 pad 1 no bias  | truncated 0.03125
    batch norm 128 eps 0.001 momentum 0.01     | 1, 0
    relu
    deconv 128-64 4x4 stride 2 pad 1 no bias   | truncated 0.044194
    batch norm 64 eps 0.001 momentum 0.01      | 1, 0
    relu
    conv 64-3 3x3 stride 1 pad 1               | uniform 0.099751, truncated 1e-05
    tanh
    """,
)
NETWORKS["mmd_gan_repulsive critic, cifar10"] = (
    lambda: mmd_gan_repulsive.Critic((3, 32, 32), 16, 64, 1.0, "none"),
    (3, 32, 32),
    """
    5983760 parameters
    conv 3-64 3x3 stride 1 pad 1     | truncated 0.27082, truncated 1e-05
    leaky relu 0.1
    conv 64-128 4x4 stride 2 pad 1   | truncated 0.043976, truncated 1e-05
    leaky relu 0.1
    conv 128-128 3x3 stride 1 pad 1  | truncated 0.041461, truncated 1e-05
    leaky relu 0.1
    conv 128-256 4x4 stride 2 pad 1  | truncated 0.031096, truncated 1e-05
    leaky relu 0.1
    conv 256-256 3x3 stride 1 pad 1  | truncated 0.029317, truncated 1e-05
    leaky relu 0.1
    conv 256-512 4x4 stride 2 pad 1  | truncated 0.021988, truncated 1e-05
    leaky relu 0.1
    conv 512-512 3x3 stride 1 pad 1  | truncated 0.020730, truncated 1e-05
    leaky relu 0.1
    linear 8192-16                   | uniform 0.027037, truncated 1e-05
    """,
)
NETWORKS["mmd_gan_repulsive generator, stl10"] = (
    lambda: mmd_gan_repulsive.Generator((3, 48, 48), 128, 64),
    (128,),
    """
    5132867 parameters
    linear 128-18432                           | uniform 0.017980, truncated 1e-05
    deconv 512-256 4x4 stride 2 pad 1 no bias  | truncated 0.022097
    batch norm 256 eps 0.001 momentum 0.01     | 1, 0
    relu
    deconv 256-128 4x4 stride 2 pad 1 no bias  | truncated 0.03125
    batch norm 128 eps 0.001 momentum 0.01     | 1, 0
    relu
    deconv 128-64 4x4 stride 2 pad 1 no bias   | truncated 0.044194
    batch norm 64 eps 0.001 momentum 0.01      | 1, 0
    relu
    conv 64-3 3x3 stride 1 pad 1               | uniform 0.099751, truncated 1e-05
    tanh
    """,
)
NETWORKS["mmd_gan_repulsive critic, stl10"] = (
    lambda: mmd_gan_repulsive.Critic((3, 48, 48), 16, 64, 1.0, "none"),
    (3, 48, 48),
    """
    6147600 parameters
    conv 3-64 3x3 stride 1 pad 1     | truncated 0.27082, truncated 1e-05
    leaky relu 0.1
    conv 64-128 4x4 stride 2 pad 1   | truncated 0.043976, truncated 1e-05
    leaky relu 0.1
    conv 128-128 3x3 stride 1 pad 1  | truncated 0.041461, truncated 1e-05
    leaky relu 0.1
    conv 128-256 4x4 stride 2 pad 1  | truncated 0.031096, truncated 1e-05
    leaky relu 0.1
    conv 256-256 3x3 stride 1 pad 1  | truncated 0.029317, truncated 1e-05
    leaky relu 0.1
    conv 256-512 4x4 stride 2 pad 1  | truncated 0.021988, truncated 1e-05
    leaky relu 0.1
    conv 512-512 3x3 stride 1 pad 1  | truncated 0.020730, truncated 1e-05
    leaky relu 0.1
    linear 18432-16                  | uniform 0.018034, truncated 1e-05
    """,
)
NETWORKS["mmd_gan_repulsive generator, celeba"] = (
    lambda: mmd_gan_repulsive.Generator((3, 64, 64), 128, 64),
    (128,),
    """
    13258307 parameters
    linear 128-16384                            | uniform 0.019063, truncated 1e-05
    deconv 1024-512 4x4 stride 2 pad 1 no bias  | truncated 0.015625
    batch norm 512 eps 0.001 momentum 0.01      | 1, 0
    relu
    deconv 512-256 4x4 stride 2 pad 1 no bias   | truncated 0.022097
    batch norm 256 eps 0.001 momentum 0.01      | 1, 0
    relu
    deconv 256-128 4x4 stride 2 pad 1 no bias   | truncated 0.03125
    batch norm 128 eps 0.001 momentum 0.01      | 1, 0
    relu
    deconv 128-64 4x4 stride 2 pad 1 no bias    | truncated 0.044194
    batch norm 64 eps 0.001 momentum 0.01       | 1, 0
    relu
    conv 64-3 3x3 stride 1 pad 1                | uniform 0.099751, truncated 1e-05
    tanh
    """,
)
NETWORKS["mmd_gan_repulsive critic, celeba"] = (
    lambda: mmd_gan_repulsive.Critic((3, 64, 64), 16, 64, 1.0, "none"),
    (3, 64, 64),
    """
    23942672 parameters
    conv 3-64 3x3 stride 1 pad 1       | truncated 0.27082, truncated 1e-05
    leaky relu 0.1
    conv 64-128 4x4 stride 2 pad 1     | truncated 0.043976, truncated 1e-05
    leaky relu 0.1
    conv 128-128 3x3 stride 1 pad 1    | truncated 0.041461, truncated 1e-05
    leaky relu 0.1
    conv 128-256 4x4 stride 2 pad 1    | truncated 0.031096, truncated 1e-05
    leaky relu 0.1
    conv 256-256 3x3 stride 1 pad 1    | truncated 0.029317, truncated 1e-05
    leaky relu 0.1
    conv 256-512 4x4 stride 2 pad 1    | truncated 0.021988, truncated 1e-05
    leaky relu 0.1
    conv 512-512 3x3 stride 1 pad 1    | truncated 0.020730, truncated 1e-05
    leaky relu 0.1
    conv 512-1024 4x4 stride 2 pad 1   | truncated 0.015548, truncated 1e-05
    leaky relu 0.1
    conv 1024-1024 3x3 stride 1 pad 1  | truncated 0.014658, truncated 1e-05
    leaky relu 0.1
    linear 16384-16                    | uniform 0.019127, truncated 1e-05
    """,
)

# --- smmd_gan.py: networks of [C:Arb] ----------------------------------------------------------------

NETWORKS["smmd_gan generator, cifar10"] = (
    lambda: smmd_gan.Generator((3, 32, 32), 128, 64),
    (128,),
    """
    5361667 parameters
    linear 128-8192                          | normal 0.01, 0
    batch norm 512 eps 1e-05 momentum 0.1    | 1, 0
    relu
    deconv 512-256 5x5 stride 2 pad 2 out 1  | normal 0.02, 0
    batch norm 256 eps 1e-05 momentum 0.1    | 1, 0
    relu
    deconv 256-128 5x5 stride 2 pad 2 out 1  | normal 0.02, 0
    batch norm 128 eps 1e-05 momentum 0.1    | 1, 0
    relu
    deconv 128-64 5x5 stride 2 pad 2 out 1   | normal 0.02, 0
    batch norm 64 eps 1e-05 momentum 0.1     | 1, 0
    relu
    conv 64-3 3x3 stride 1 pad 1             | normal 0.02, 0
    sigmoid
    """,
)
NETWORKS["smmd_gan critic, cifar10"] = (
    lambda: smmd_gan.Critic((3, 32, 32), 1, 64),
    (3, 32, 32),
    """
    5860865 parameters
    conv 3-64 3x3 stride 1 pad 1     | truncated 0.02, 0
    leaky relu 0.2
    conv 64-128 4x4 stride 2 pad 1   | truncated 0.02, 0
    leaky relu 0.2
    conv 128-128 3x3 stride 1 pad 1  | truncated 0.02, 0
    leaky relu 0.2
    conv 128-256 4x4 stride 2 pad 1  | truncated 0.02, 0
    leaky relu 0.2
    conv 256-256 3x3 stride 1 pad 1  | truncated 0.02, 0
    leaky relu 0.2
    conv 256-512 4x4 stride 2 pad 1  | truncated 0.02, 0
    leaky relu 0.2
    conv 512-512 3x3 stride 1 pad 1  | truncated 0.02, 0
    leaky relu 0.2
    linear 8192-1                    | normal 0.02, 0
    """,
)
# From 64 to 127 pixels, Glorot uniform in all blocks: b^2 = 6 / (k^2 (c_in + c_out)).
NETWORKS["smmd_gan generator, 64 pixels"] = (
    lambda: smmd_gan.Generator((3, 64, 64), 128, 64),
    (128,),
    """
    12219715 parameters
    linear 128-16384                              | normal 0.01, 0
    batch norm 1024 eps 1e-05 momentum 0.1        | 1, 0
    relu
    nearest x 2
    conv 1024-512 3x3 stride 1 pad 1 no bias      | uniform 0.020833
    batch norm 512 eps 1e-05 momentum 0.1         | 1, 0
    relu
    conv 512-512 3x3 stride 1 pad 1               | uniform 0.025516, 0
    nearest x 2
    conv 1024-512 1x1 stride 1 pad 0              | uniform 0.0625, 0
    add
    batch norm 512 eps 1e-05 momentum 0.1         | 1, 0
    relu
    nearest x 2
    conv 512-256 3x3 stride 1 pad 1 no bias       | uniform 0.029463
    batch norm 256 eps 1e-05 momentum 0.1         | 1, 0
    relu
    conv 256-256 3x3 stride 1 pad 1               | uniform 0.036084, 0
    nearest x 2
    conv 512-256 1x1 stride 1 pad 0               | uniform 0.088388, 0
    add
    batch norm 256 eps 1e-05 momentum 0.1         | 1, 0
    relu
    nearest x 2
    conv 256-128 3x3 stride 1 pad 1 no bias       | uniform 0.041667
    batch norm 128 eps 1e-05 momentum 0.1         | 1, 0
    relu
    conv 128-128 3x3 stride 1 pad 1               | uniform 0.051031, 0
    nearest x 2
    conv 256-128 1x1 stride 1 pad 0               | uniform 0.125, 0
    add
    batch norm 128 eps 1e-05 momentum 0.1         | 1, 0
    relu
    nearest x 2
    conv 128-64 3x3 stride 1 pad 1 no bias        | uniform 0.058926
    batch norm 64 eps 1e-05 momentum 0.1          | 1, 0
    relu
    conv 64-64 3x3 stride 1 pad 1                 | uniform 0.072169, 0
    nearest x 2
    conv 128-64 1x1 stride 1 pad 0                | uniform 0.176777, 0
    add
    batch norm 64 eps 1e-05 momentum 0.1          | 1, 0
    relu
    conv 64-3 3x3 stride 1 pad 1                  | normal 0.02, 0
    sigmoid
    """,
)
NETWORKS["smmd_gan critic, 64 pixels"] = (
    lambda: smmd_gan.Critic((3, 64, 64), 1, 64),
    (3, 64, 64),
    """
    10103297 parameters
    conv 3-64 3x3 stride 1 pad 1             | uniform 0.099751, 0
    leaky relu 0.2
    relu
    conv 64-64 3x3 stride 1 pad 1 no bias    | uniform 0.072169
    relu
    conv 64-128 3x3 stride 1 pad 1           | uniform 0.058926, 0
    mean pool 2
    mean pool 2
    conv 64-128 1x1 stride 1 pad 0           | uniform 0.176777, 0
    add
    relu
    conv 128-128 3x3 stride 1 pad 1 no bias  | uniform 0.051031
    relu
    conv 128-256 3x3 stride 1 pad 1          | uniform 0.041667, 0
    mean pool 2
    mean pool 2
    conv 128-256 1x1 stride 1 pad 0          | uniform 0.125, 0
    add
    relu
    conv 256-256 3x3 stride 1 pad 1 no bias  | uniform 0.036084
    relu
    conv 256-512 3x3 stride 1 pad 1          | uniform 0.029463, 0
    mean pool 2
    mean pool 2
    conv 256-512 1x1 stride 1 pad 0          | uniform 0.088388, 0
    add
    relu
    conv 512-512 3x3 stride 1 pad 1 no bias  | uniform 0.025516
    relu
    conv 512-1024 3x3 stride 1 pad 1         | uniform 0.020833, 0
    mean pool 2
    mean pool 2
    conv 512-1024 1x1 stride 1 pad 0         | uniform 0.0625, 0
    add
    leaky relu 0.2
    sum over space
    linear 1024-1                            | normal 0.01, 0
    """,
)
NETWORKS["smmd_gan generator, celeba"] = (  # [C:Arb]: no batch norm in its blocks
    lambda: smmd_gan.Generator((3, 160, 160), 128, 64),
    (128,),
    """
    13405891 parameters
    linear 128-25600                              | normal 0.01, 0
    relu
    nearest x 2
    conv 1024-512 3x3 stride 1 pad 1 no bias      | uniform 0.020833
    relu
    conv 512-512 3x3 stride 1 pad 1               | uniform 0.025516, 0
    nearest x 2
    conv 1024-512 1x1 stride 1 pad 0              | uniform 0.0625, 0
    add
    relu
    nearest x 2
    conv 512-256 3x3 stride 1 pad 1 no bias       | uniform 0.029463
    relu
    conv 256-256 3x3 stride 1 pad 1               | uniform 0.036084, 0
    nearest x 2
    conv 512-256 1x1 stride 1 pad 0               | uniform 0.088388, 0
    add
    relu
    nearest x 2
    conv 256-128 3x3 stride 1 pad 1 no bias       | uniform 0.041667
    relu
    conv 128-128 3x3 stride 1 pad 1               | uniform 0.051031, 0
    nearest x 2
    conv 256-128 1x1 stride 1 pad 0               | uniform 0.125, 0
    add
    relu
    nearest x 2
    conv 128-64 3x3 stride 1 pad 1 no bias        | uniform 0.058926
    relu
    conv 64-64 3x3 stride 1 pad 1                 | uniform 0.072169, 0
    nearest x 2
    conv 128-64 1x1 stride 1 pad 0                | uniform 0.176777, 0
    add
    batch norm 64 eps 1e-05 momentum 0.1          | 1, 0
    relu
    deconv 64-3 5x5 stride 2 pad 2 out 1          | normal 0.02, 0
    sigmoid
    """,
)
NETWORKS["smmd_gan critic, celeba"] = (
    lambda: smmd_gan.Critic((3, 160, 160), 1, 64),
    (3, 160, 160),
    """
    17440385 parameters
    conv 3-64 5x5 stride 2 pad 2      | truncated 0.02, 0
    leaky relu 0.2
    conv 64-128 5x5 stride 2 pad 2    | truncated 0.02, 0
    leaky relu 0.2
    conv 128-256 5x5 stride 2 pad 2   | truncated 0.02, 0
    leaky relu 0.2
    conv 256-512 5x5 stride 2 pad 2   | truncated 0.02, 0
    leaky relu 0.2
    conv 512-1024 5x5 stride 2 pad 2  | truncated 0.02, 0
    leaky relu 0.2
    linear 25600-1                    | normal 0.01, 0
    """,
)

# --- gram_net.py: Glorot's uniform law, as the Julia code ---------------------------------------------

NETWORKS["gram_net generator, ring2d"] = (
    lambda: gram_net.Generator((2,), 2, 100),
    (2,),
    """
    10602 parameters
    linear 2-100    | uniform 0.242536, 0
    relu
    linear 100-100  | uniform 0.173205, 0
    relu
    linear 100-2    | uniform 0.242536, 0
    """,
)
NETWORKS["gram_net critic, ring2d"] = (
    lambda: gram_net.Critic((2,), 10, 100, False),
    (2,),
    """
    11410 parameters
    linear 2-100    | uniform 0.242536, 0
    relu
    linear 100-100  | uniform 0.173205, 0
    relu
    linear 100-10   | uniform 0.233550, 0
    """,
)
NETWORKS["gram_net generator, mnist"] = (
    lambda: gram_net.Generator((1, 28, 28), 100, 16),
    (100,),
    """
    1533984 parameters
    linear 100-600                         | uniform 0.092582, 0
    batch norm 600 eps 1e-05 momentum 0.1  | 1, 0
    relu
    linear 600-600                         | uniform 0.070711, 0
    batch norm 600 eps 1e-05 momentum 0.1  | 1, 0
    relu
    linear 600-800                         | uniform 0.065465, 0
    batch norm 800 eps 1e-05 momentum 0.1  | 1, 0
    relu
    linear 800-784                         | uniform 0.061546, 0
    tanh
    """,
)
NETWORKS["gram_net critic, mnist"] = (
    lambda: gram_net.Critic((1, 28, 28), 100, 16, False),
    (1, 28, 28),
    """
    43108 parameters
    conv 1-16 3x3 stride 1 pad 1          | uniform 0.198030, 0
    batch norm 16 eps 1e-05 momentum 0.1  | 1, 0
    relu
    max pool 2
    conv 16-32 3x3 stride 1 pad 1         | uniform 0.117851, 0
    batch norm 32 eps 1e-05 momentum 0.1  | 1, 0
    relu
    max pool 2
    conv 32-32 3x3 stride 1 pad 1         | uniform 0.102062, 0
    batch norm 32 eps 1e-05 momentum 0.1  | 1, 0
    relu
    max pool 2
    linear 288-100                        | uniform 0.124354, 0
    """,
)
NETWORKS["gram_net generator, cifar10"] = (
    lambda: gram_net.Generator((3, 32, 32), 128, 32),
    (128,),
    """
    430115 parameters
    linear 128-2048                        | uniform 0.052511, 0
    batch norm 128 eps 1e-05 momentum 0.1  | 1, 0
    relu
    deconv 128-64 4x4 stride 2 pad 1       | uniform 0.044194, 0
    batch norm 64 eps 1e-05 momentum 0.1   | 1, 0
    relu
    deconv 64-32 4x4 stride 2 pad 1        | uniform 0.0625, 0
    batch norm 32 eps 1e-05 momentum 0.1   | 1, 0
    relu
    deconv 32-3 4x4 stride 2 pad 1         | uniform 0.103510, 0
    tanh
    """,
)
NETWORKS["gram_net critic, cifar10"] = (
    lambda: gram_net.Critic((3, 32, 32), 128, 32, False),
    (3, 32, 32),
    """
    428256 parameters
    conv 3-32 4x4 stride 2 pad 1           | uniform 0.103510, 0
    leaky relu 0.2
    conv 32-64 4x4 stride 2 pad 1          | uniform 0.0625, 0
    batch norm 64 eps 1e-05 momentum 0.1   | 1, 0
    leaky relu 0.2
    conv 64-128 4x4 stride 2 pad 1         | uniform 0.044194, 0
    batch norm 128 eps 1e-05 momentum 0.1  | 1, 0
    leaky relu 0.2
    linear 2048-128                        | uniform 0.052511, 0
    """,
)
NETWORKS["gram_net weak critic, cifar10"] = (
    lambda: gram_net.Critic((3, 32, 32), 128, 32, True),
    (3, 32, 32),
    """
    182208 parameters
    conv 3-32 4x4 stride 2 pad 1          | uniform 0.103510, 0
    leaky relu 0.2
    conv 32-32 4x4 stride 2 pad 1         | uniform 0.076547, 0
    batch norm 32 eps 1e-05 momentum 0.1  | 1, 0
    leaky relu 0.2
    conv 32-64 4x4 stride 2 pad 1         | uniform 0.0625, 0
    batch norm 64 eps 1e-05 momentum 0.1  | 1, 0
    leaky relu 0.2
    linear 1024-128                       | uniform 0.072169, 0
    """,
)


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
    make, shape, table = NETWORKS[name]
    torch.manual_seed(1)
    check_network(make(), shape, table)


# --- settings ----------------------------------------------------------------------------------------

LI = (1.0, 2.0, 4.0, 8.0, 16.0)
SETTINGS = [  # script, what is asked for, what is then set
    # [C:GMMN]; bandwidths: the square roots of 2, 5, 10, 20, 40, 80
    (
        gmmn,
        dict(dataset="mnist"),
        dict(
            image_size=28, total_steps=40_000, batch_size=1000, width=1024, latent_dim=10, optimizer="sgd",
            learning_rate=2.0, momentum=0.9, drop_step=10_000, kernel="rbf",
        ),
    ),
    (gmmn, dict(dataset="mnist", autoencoder=True), dict(feature_dim=32, ae_steps=3000, bandwidths=(1.0,))),
    # Batch sizes and d: the GAMN paper; the rest: [C:IW], bandwidths: [C:Li]
    *(
        (
            gamn,
            dict(dataset=name),
            dict(
                image_size=size, batch_size=batch, width=width, beta1=beta1, beta2=0.9, learning_rate=1e-4,
                critic_learning_rate=1e-4, latent_dim=128, feature_dim=10, n_critic=5, n_generator=1,
                lambda_reg=10.0, gp_target=1.0, total_steps=200_000, kernel="rbf", bandwidths=LI,
                data_mmd_weight=0.0, sample_bn="batch",
            ),
        )
        for name, size, batch, width, beta1 in (
            ("mnist", 28, 50, 64, 0.5), ("cifar10", 32, 64, 128, 0.5), ("lsun-bedroom", 64, 64, 64, 0.0),
        )
    ),
    (gamn, dict(dataset="swissroll"), dict(batch_size=256, latent_dim=2, feature_dim=10)),
    # [C:Li]: its schedule makes so many updates of the generator in 1000 epochs
    (
        mmd_gan,
        dict(dataset="mnist"),
        dict(
            image_size=32, total_steps=149_640, batch_size=64, width=64, feature_dim=10, latent_dim=10,
            learning_rate=5e-5, critic_learning_rate=5e-5, clip=0.01, lambda_ae=8.0, lambda_rank=16.0,
            n_critic=5, warmup_critic=100, kernel="rbf", bandwidths=LI, sample_bn="batch",
        ),
    ),
    (
        mmd_gan,
        dict(dataset="cifar10"),
        dict(
            image_size=32, total_steps=124_614, batch_size=64, width=64, feature_dim=128, latent_dim=128,
            learning_rate=5e-5, critic_learning_rate=5e-5, clip=0.01, lambda_ae=8.0, lambda_rank=16.0,
            n_critic=5, warmup_critic=100, kernel="rbf", bandwidths=LI, sample_bn="batch",
        ),
    ),
    (
        mmd_gan,
        dict(dataset="celeba"),
        dict(
            image_size=64, total_steps=410_336, batch_size=64, width=64, feature_dim=64, latent_dim=64,
            learning_rate=5e-5, critic_learning_rate=5e-5, clip=0.01, lambda_ae=8.0, lambda_rank=16.0,
            n_critic=5, warmup_critic=100, kernel="rbf", bandwidths=LI, sample_bn="batch",
        ),
    ),
    (
        mmd_gan,
        dict(dataset="lsun-bedroom"),
        dict(image_size=64, batch_size=64, feature_dim=128, latent_dim=128, learning_rate=5e-5, clip=0.01),
    ),
    # Wang et al. 2019, section 5.1 and their scripts' rates: those of critic and generator
    (
        mmd_gan_repulsive,
        dict(dataset="cifar10"),
        dict(
            image_size=32, total_steps=100_000, batch_size=64, width=64, feature_dim=16, latent_dim=128,
            critic_learning_rate=5e-4, learning_rate=2e-4, beta1=0.5, beta2=0.999, lam=1.0, kernel="rbf",
            bandwidths=(1.0,), eval_every=12_500, eval_split="train", sample_bn="running",
        ),
    ),
    (
        mmd_gan_repulsive,
        dict(dataset="stl10"),
        dict(image_size=48, critic_learning_rate=2e-4, learning_rate=2e-4, total_steps=100_000),
    ),
    (
        mmd_gan_repulsive,
        dict(dataset="celeba"),
        dict(image_size=64, critic_learning_rate=1e-4, learning_rate=2e-4, total_steps=100_000),
    ),
    (
        mmd_gan_repulsive,
        dict(dataset="lsun-bedroom"),
        dict(image_size=64, critic_learning_rate=2e-4, learning_rate=1e-4, total_steps=100_000),
    ),
    (mmd_gan_repulsive, dict(dataset="cifar10", kernel="rq"), dict(bandwidths=(0.2, 0.5, 1.0, 2.0, 5.0))),
    (mmd_gan_repulsive, dict(dataset="cifar10", loss="hinge"), dict(feature_dim=1)),
    # [C:Arb]'s configurations
    (
        smmd_gan,
        dict(dataset="cifar10"),
        dict(
            image_size=32, total_steps=150_000, batch_size=64, width=64, feature_dim=1, latent_dim=128,
            learning_rate=1e-4, critic_learning_rate=1e-4, beta1=0.5, beta2=0.9, clip_norm=1.0, n_critic=5,
            warmup_critic=10, constraint="scaled", lambda_scale=10.0, kernel="rbf", bandwidths=(1.0,),
            sn_scale=True, sample_bn="batch",
        ),
    ),
    (
        smmd_gan,
        dict(dataset="celeba"),
        dict(
            image_size=160, total_steps=150_000, batch_size=64, width=64, feature_dim=1, latent_dim=128,
            learning_rate=1e-4, critic_learning_rate=1e-4, lambda_scale=10.0,
        ),
    ),
    (smmd_gan, dict(dataset="imagenet"), dict(image_size=64, learning_rate=2e-4, critic_learning_rate=2e-4)),
    (
        smmd_gan,
        dict(dataset="cifar10", constraint="swgan"),
        dict(kernel="linear", feature_dim=1, lambda_scale=10.0),
    ),
    # [C:Bin]'s weights and kernel, the alphas of its paper
    (
        smmd_gan,
        dict(dataset="cifar10", constraint="gradient-penalty"),
        dict(
            kernel="rq-linear", bandwidths=(0.2, 0.5, 1.0, 2.0, 5.0), feature_dim=16, lambda_gp=1.0,
            lambda_activation=1.0, critic_norm="none", batch_size=64, learning_rate=1e-4, n_critic=5,
        ),
    ),
    # Srivastava et al. 2020, section 4 and Appendix B
    (
        gram_net,
        dict(dataset="ring2d"),
        dict(
            batch_size=200, width=100, feature_dim=10, learning_rate=1e-3, critic_learning_rate=1e-3,
            beta1=0.5, beta2=0.999, bandwidths=(1.0,), positivity="sum", positivity_weight=1.0, ridge=1e-3,
        ),
    ),
    (
        gram_net,
        dict(dataset="mnist"),
        dict(
            image_size=28, batch_size=200, width=16, feature_dim=100, latent_dim=100, learning_rate=1e-3,
            critic_learning_rate=1e-3, beta1=0.5, bandwidths=(0.1, 1.0, 10.0, 100.0), eval_split="test",
        ),
    ),
    (
        gram_net,
        dict(dataset="cifar10"),
        dict(
            image_size=32, batch_size=64, width=32, feature_dim=128, latent_dim=128, learning_rate=5e-5,
            critic_learning_rate=5e-5, beta1=0.5, bandwidths=LI, eval_split="test",
        ),
    ),
    (gram_net, dict(dataset="celeba"), dict(batch_size=64, learning_rate=5e-5, eval_split="test")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "asked", "expected"), SETTINGS, ids=lambda v: getattr(v, "__name__", None)
)
def test_settings(script, asked, expected):
    args = script.resolve(script.Args(**asked))
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("script", "dataset", "split"),
    [
        (smmd_gan, "cifar10", "all"),  # [C:Arb], [C:Bin]: the test images too
        (smmd_gan, "mnist", "all"),
        (smmd_gan, "celeba", "all"),
        (mmd_gan_repulsive, "celeba", "all"),  # 202,599 images
        (mmd_gan_repulsive, "cifar10", "train"),
        (mmd_gan, "celeba", "train"),  # [C:Li]: 162,770 images
        (gram_net, "cifar10", "train"),
    ],
)
def test_images_that_are_trained_on(script, dataset, split):
    assert script.resolve(script.Args(dataset=dataset)).train_split == split


def test_bandwidths_and_constants_of_gmmn():
    """The numbers of [C:GMMN] are variances; its dropout is that of the encoder's two inputs."""
    args = gmmn.resolve(gmmn.Args(dataset="mnist"))
    assert [sigma**2 for sigma in args.bandwidths] == pytest.approx([2, 5, 10, 20, 40, 80])
    assert (gmmn.AE_BATCH, gmmn.AE_DROPOUT) == (100, (0.2, 0.5))


@pytest.mark.parametrize(
    ("dataset", "options", "gain"),
    [
        ("cifar10", dict(lam=1.0), 1.6818),  # 64^(1/8): the repulsive losses of Table S3
        ("stl10", dict(lam=1.0, kernel="rbf-b"), 1.6818),
        ("celeba", dict(lam=1.0), 1.5157),  # 64^(1/10)
        ("cifar10", dict(lam=-1.0), 1.8340),  # 128^(1/8): hinge and MMD-rbf of Table S3
        ("cifar10", dict(loss="hinge"), 1.8340),
        ("celeba", dict(lam=-1.0), 1.6245),  # 128^(1/10)
    ],
)
def test_gain_of_the_spectral_norm(dataset, options, gain):
    args = mmd_gan_repulsive.resolve(mmd_gan_repulsive.Args(dataset=dataset, **options))
    assert args.sn_gain == pytest.approx(gain, abs=5e-5)


@pytest.mark.parametrize(("script", "early"), [(mmd_gan, 25), (smmd_gan, 20)])
def test_critic_updates(script, early):
    """100 or 10 at first and after each 500th update of the generator, 5 otherwise."""
    args = script.resolve(script.Args(dataset="cifar10"))
    first = {mmd_gan: 100, smmd_gan: 10}[script]
    for step in range(1, 1600):
        many = step <= early or (step - 1) % 500 == 0
        assert script.critic_steps(step, args) == (first if many else 5)
