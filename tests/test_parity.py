"""Our functions against the numbers that the papers' authors' own code gave for the same inputs, in float64.

tests/parity/README.md says what each number is, whose code it is from and where the two are known to differ.
`theirs` is the file of numbers; every test compares its part of it, and no number of any file is left out. A
difference is ||ours - theirs|| / ||theirs||; where theirs is below 1e-12 in norm, ||ours - theirs||. The
largest one of each test is printed by

    python -m pytest tests/test_parity.py -n 0 -rP
"""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import gmmn
import gram_net
import mmd_gan
import mmd_gan_repulsive as repulsive
import smmd_gan
from common import datasets, evaluation, kernels, run

FOLDER = Path(__file__).parent / "parity"

# The test, the file that it reads, and which keys of it (a regular expression).
KEYS = {
    "test_repulsive_losses": ("repulsive", r"(mid|near|wide|one)_(x|y|(rep|repb|rbf5|rq5|rbfb|hinge|ns)_.*)"),
    "test_family_of_losses": ("repulsive", r"(mid|near|wide)_(x|y|lam-?[0-9.]+_.*)"),
    "test_bounded_family_of_losses": ("repulsive", r"(mid|near|wide)_(x|y|lamb-?[0-9.]+_.*)"),
    "test_gradient_penalised_loss": ("repulsive", r"gp.*"),
    "test_spectral_norm_of_repulsive": ("repulsive", r"sn_.*"),
    "test_kernels": ("smmd", r"[abc]_(x|y|(mixrbf|rbf|mixrq|rq5|dot)_.*|(rq1dot|rq5dot)_biased.*)"),
    "test_rq_linear_as_coded": ("smmd", r"[abc]_(x|y|(rq1dot|rq5dot)_unbiased.*)"),
    "test_distance_kernel": ("smmd", r"[abc]_(x|y|distance_.*)"),
    "test_scaled_mmd": ("smmd", r"img_.*|net._.*|(smmd|swgan).*"),
    "test_gradient_penalty_of_smmd": ("smmd", r"img_.*|net3_.*|flat_.*|gp.*"),
    "test_spectral_norm_of_smmd": ("smmd", r"sn_.*"),
    "test_kid": ("smmd", r"kid_.*"),
    "test_three_samples": ("smmd", r"t3_.*"),
    "test_mmd_gan_losses": ("mmd_gan", r"[abcd]_.*"),
    "test_mmd_gan_training": ("mmd_gan", r"loop_.*"),
    "test_gmmn_loss": ("gmmn", r"(tfd)?(pixel|code)_.*"),
    "test_gmmn_training": ("gmmn", r"sgd_.*"),
    "test_gmmn_drop_of_the_rate": ("gmmn", r"sgd_sizes|sgddrop_.*"),
    "test_ratio_and_losses_of_julia": ("gram", r"[abc]_(real|fake|sigmas|J_.*)"),
    "test_ratio_and_losses_of_torch": ("gram", r"[abc]_(real|fake|sigmas|T_.*)"),
    "test_gram_training": ("gram", r"step_.*"),
}

# Known difference of tests/parity/README.md: the deviation that says it, and words that stand there.
DEVIATIONS = [
    (2, repulsive, 3, "for lambda < 0"),
    (3, repulsive, 7, "1 is taken off for rbf-b too"),
    (4, smmd_gan, 3, "over the rows"),
    (5, smmd_gan, 2, "e = 1e-5"),
    (6, smmd_gan, 4, "true diagonal"),
    (7, smmd_gan, 9, "ours is another estimate"),
    (8, gmmn, 2, "1e-10"),
    (8, gram_net, 2, "square root of the MMD^2"),
    (9, gram_net, 4, "mean over the bandwidths"),
    (11, repulsive, 2, "starts unnormalised"),
]


class Numbers:
    """The arrays of one file, by key; it remembers which were looked at, and the largest difference."""

    def __init__(self, name):
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
            self.arrays = dict(file)
        self.seen, self.largest = set(), 0.0

    def __contains__(self, key):
        return key in self.arrays

    def array(self, key):
        self.seen.add(key)
        return self.arrays[key]

    def list(self, key):
        return self.array(key).tolist()

    def tensor(self, key):
        return torch.tensor(self.array(key), dtype=torch.float64)

    def variable(self, key):
        return self.tensor(key).requires_grad_()

    def difference(self, key, ours):
        """Return how far ours is from the array, relative to the array."""
        wanted, ours = self.tensor(key), torch.as_tensor(ours).detach().double()
        assert ours.shape == wanted.shape, (key, ours.shape, wanted.shape)
        size = wanted.norm().item()
        return (ours - wanted).norm().item() / (size if size > 1e-12 else 1.0)

    def compare(self, key, ours, bound=1e-9):
        found = self.difference(key, ours)
        self.largest = max(self.largest, found)
        assert found <= bound, f"{key} differs by {found:.1e}, more than {bound:.0e}"

    def compare_with_gradients(self, key, loss, bound=1e-9, **inputs):
        """Compare loss with the array of that key and d loss / d x, given as x=, with that of key_gx.

        A gradient of which there is no array must be 0.
        """
        self.compare(key, loss, bound)
        for name, x in inputs.items():
            (gradient,) = torch.autograd.grad(
                loss, x, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            if f"{key}_g{name}" in self:
                self.compare(f"{key}_g{name}", gradient, bound)
            else:
                assert not gradient.any(), f"theirs has no gradient {key}_g{name}"


@pytest.fixture
def theirs(request):
    name, pattern = KEYS[request.function.__name__]
    numbers, failed_before = Numbers(name), request.session.testsfailed
    yield numbers
    if request.session.testsfailed == failed_before:
        left = {key for key in numbers.arrays if re.fullmatch(pattern, key)} - numbers.seen
        assert not left, f"{name}.npz: nobody looks at {sorted(left)}"
        print(f"{name}.npz  {pattern}  {len(numbers.seen)} arrays, differences up to {numbers.largest:.1e}")


def test_no_number_is_left_out():
    tests = {name for name, test in globals().items() if name.startswith("test_")}
    assert set(KEYS) == tests - {"test_no_number_is_left_out", "test_known_differences_are_deviations"}
    files = {path.stem for path in FOLDER.glob("*.npz")}
    assert files == {name for name, _ in KEYS.values()}
    for name in files:
        patterns = [pattern for file, pattern in KEYS.values() if file == name]
        left = [key for key in Numbers(name).arrays if not any(re.fullmatch(p, key) for p in patterns)]
        assert not left, f"{name}.npz: no test has {left}"


def test_known_differences_are_deviations():
    listed = (FOLDER / "README.md").read_text().split("## Known differences")[1]
    for difference, script, number, words in DEVIATIONS:
        pattern = r"^ {1,2}(\d+)\. (.*?)(?=^ {1,2}\d+\. |^\w|\Z)"
        deviations = dict(re.findall(pattern, script.__doc__, re.M | re.S))
        assert words in " ".join(deviations[str(number)].split()), (difference, script.__name__, number)
        (entry,) = re.findall(rf"^{difference}\. .*", listed, re.M)
        assert f"deviation {number} of `{script.__name__}.py`" in entry, difference


# --- training loops ----------------------------------------------------------------------------------


class Given:
    """Stands for a data set: batches (steps, B, *shape), handed out in turn."""

    def __init__(self, name, batches, value_range):
        self.name, self.batches, self.shape, self.value_range = name, batches, batches.shape[2:], value_range

    def batch(self, i):
        return self.batches[i].clone()


def set_weights(module, vector):
    """Write the elements of vector to the parameters of module, in their order."""
    nn.utils.vector_to_parameters(torch.as_tensor(vector), module.parameters())
    assert len(vector) == sum(p.numel() for p in module.parameters())


def train(script, args, data, noises, initialise, monkeypatch, folder):
    """Run script.train in float64 on the batches of data and on these noises.

    initialise(models) sets the weights. Returns, after each step of an optimizer, its name and a copy of the
    networks.
    """
    noises, models, after_steps = iter(noises), {}, []

    def load_checkpoint(args, name, found, *rest):
        models.update(found)
        initialise(models)
        return 0

    def draw_noise(n, args, device):
        return next(noises, torch.zeros(n, args.latent_dim))  # at the end, zeros: for the picture

    def note(optimizer, *rest):
        name = next(name for name, model in models.items() if model is optimizer)
        networks = {name: m for name, m in models.items() if isinstance(m, nn.Module)}
        after_steps.append((name, copy.deepcopy(networks)))

    monkeypatch.setattr(datasets, "load", lambda *_, **__: data)
    monkeypatch.setattr(run, "load_checkpoint", load_checkpoint)
    monkeypatch.setattr(run, "save_checkpoint", lambda *_: None)
    monkeypatch.setattr(script, "draw_noise", draw_noise)
    monkeypatch.setattr(script, "draw_picture", lambda path, *_: Image.new("RGB", (8, 8)).save(path))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    args.runs_dir, args.device, args.eval_every, args.log_every = str(folder), "cpu", 0, 0
    hook = register_optimizer_step_post_hook(note)
    torch.set_default_dtype(torch.float64)
    try:
        script.train(args)
    finally:
        torch.set_default_dtype(torch.float32)
        hook.remove()
    return after_steps


def weights(module):
    """Return all parameters of module as one vector."""
    return nn.utils.parameters_to_vector(module.parameters())


# --- repulsive.npz: mmd_gan_repulsive.py -------------------------------------------------------------

SIGMA_1, SIGMA_5 = (1.0,), (1.0, 2**0.5, 2.0, 8**0.5, 4.0)
ALPHA_3, ALPHA_5 = (0.1, 1.0, 10.0), (0.2, 0.5, 1.0, 2.0, 5.0)
LAMBDAS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


def test_repulsive_losses(theirs):
    options = {
        "rep": dict(lam=1.0, kernel="rbf", bandwidths=SIGMA_1),
        "repb": dict(lam=1.0, kernel="rbf-b", bandwidths=SIGMA_1),
        "rbf5": dict(lam=-1.0, kernel="rbf", bandwidths=SIGMA_5),
        "rq5": dict(lam=-1.0, kernel="rq", bandwidths=ALPHA_5),
        "rbfb": dict(lam=-1.0, kernel="rbf-b", bandwidths=SIGMA_1),
        "hinge": dict(loss="hinge"),
        "ns": dict(loss="non-saturating"),
    }
    for data in ("mid", "near", "wide", "one"):
        x, y = theirs.variable(f"{data}_x"), theirs.variable(f"{data}_y")
        for loss, chosen in options.items():
            if f"{data}_{loss}_cri" in theirs:
                c_loss, g_loss, _ = repulsive.losses(x, y, repulsive.Args(**chosen))
                theirs.compare_with_gradients(f"{data}_{loss}_cri", c_loss, x=x, y=y)
                theirs.compare_with_gradients(f"{data}_{loss}_gen", g_loss, x=x, y=y)


def test_family_of_losses(theirs):
    for data in ("mid", "near", "wide"):
        x, y = theirs.variable(f"{data}_x"), theirs.variable(f"{data}_y")
        for lam in LAMBDAS:
            args = repulsive.Args(lam=lam, kernel="rbf", bandwidths=SIGMA_1)
            c_loss, g_loss, _ = repulsive.losses(x, y, args)
            theirs.compare_with_gradients(f"{data}_lam{lam:g}_cri", c_loss, x=x, y=y)
            theirs.compare_with_gradients(f"{data}_lam{lam:g}_gen", g_loss, x=x, y=y)


def test_bounded_family_of_losses(theirs):
    for data in ("mid", "near", "wide"):
        x, y = theirs.variable(f"{data}_x"), theirs.variable(f"{data}_y")
        for lam in LAMBDAS:
            key, args = f"{data}_lamb{lam:g}", repulsive.Args(lam=lam, kernel="rbf-b", bandwidths=SIGMA_1)
            c_loss, g_loss, _ = repulsive.losses(x, y, args)
            theirs.compare_with_gradients(f"{key}_gen", g_loss, x=x, y=y)
            if lam >= 0:
                theirs.compare_with_gradients(f"{key}_cri", c_loss, x=x, y=y)
                continue
            # Deviation 3: their cross term is unbounded for lambda < 0 too. With it ours is theirs.
            d2_xx, d2_xy, d2_yy = kernels.squared_distance_blocks(x, y)
            d2_xx, _, d2_yy = repulsive.bounded(d2_xx, d2_xy, d2_yy, lam)
            gram = [kernels.rbf(d2, SIGMA_1) for d2 in (d2_xx, d2_xy, d2_yy)]
            theirs.compare_with_gradients(f"{key}_cri", repulsive.critic_loss(*gram, lam), x=x, y=y)
            if (data, lam) == ("wide", -1):
                both = c_loss.item(), theirs.array(f"{key}_cri")
                assert both == pytest.approx((0.2235, -0.0203), abs=5e-5)


def test_gradient_penalised_loss(theirs):
    for d in (1, 4):
        w1, b1, w2, b2 = (theirs.variable(f"gp{d}_{name}") for name in ("w1", "b1", "w2", "b2"))
        real, fake = theirs.variable("gp_real"), theirs.tensor("gp_fake")
        real_feat, fake_feat = (F.leaky_relu(v @ w1.T + b1, 0.1) @ w2.T + b2 for v in (real, fake))
        theirs.compare(f"gp{d}_feat_real", real_feat)
        theirs.compare(f"gp{d}_feat_fake", fake_feat)
        theirs.compare(f"gp{d}_jac2", smmd_gan.jacobian_norm2(real_feat, real, True))
        two = torch.tensor(2.0, dtype=torch.float64)  # of which the scale makes (2 - 1) / (1 + ...)
        theirs.compare(f"gp{d}_scale", repulsive.penalised(two, real_feat, real, 0.1))
        for name, kernel in (("rep", "rbf"), ("repb", "rbf-b")):
            args = repulsive.Args(lam=1.0, kernel=kernel, bandwidths=SIGMA_1)
            c_loss, _, _ = repulsive.losses(real_feat, fake_feat, args)
            theirs.compare(f"gp{d}_{name}_plain", c_loss)
            # Known difference 3: 1 is not taken off their bounded loss.
            theirs_without_1 = repulsive.penalised(c_loss + (name == "repb"), real_feat, real, 0.1)
            theirs.compare_with_gradients(f"gp{d}_{name}_cri", theirs_without_1, w1=w1, b1=b1, w2=w2, b2=b2)
        ours = repulsive.penalised(c_loss, real_feat, real, 0.1).item()
        if d == 1:
            assert (ours, theirs.array("gp1_repb_cri")) == pytest.approx((-0.7656, -0.0678), abs=5e-5)


def test_spectral_norm_of_repulsive(theirs):
    """Theirs has its vector on the side, input or output, that has fewer elements; ours is an input."""
    steps = theirs.list("sn_steps")
    layers = {  # the layer, the shape of its input, the norm, and whether their vector is an input
        "picoin": (nn.Conv2d(2, 3, 3, 1, 1), (2, 6, 6), "pico", True),
        "picoout": (nn.Conv2d(2, 3, 4, 2, 1), (2, 8, 8), "pico", False),
        "pim": (nn.Conv2d(2, 4, 3, 1, 1), (2, 6, 6), "pim", False),
        "dense": (nn.Linear(12, 5), (12,), "pico", False),
    }
    for name, (layer, in_shape, norm_name, on_input) in layers.items():
        w, start = theirs.variable(f"sn_{name}_w"), theirs.tensor(f"sn_{name}_start")
        layer.double().weight.data.copy_(w.detach())
        norm = repulsive.SpectralNorm(layer, in_shape, 1.0, norm_name)
        v = start if on_input else norm.adjoint(w, start).detach()
        norm.v.copy_((v / v.norm()).view_as(norm.v))
        # Known difference 11: at step 0 the norm of their starting vector is in sigma.
        first = norm.operator(w, start) if on_input else norm.adjoint(w, start)
        sigma, vectors = {0: first.norm()}, {}
        for t in range(1, 251):
            if on_input:
                norm.iterate(w, 1)
                vectors[t] = norm.v.clone()
                sigma[t] = norm.operator(w, vectors[t]).norm()
            else:  # half a step of ours: from the input to the output, where theirs is
                u = norm.operator(w, norm.v).detach()
                vectors[t] = u / u.norm()
                sigma[t] = norm.adjoint(w, vectors[t]).norm()
                norm.iterate(w, 1)
        theirs.compare(f"sn_{name}_sigma", torch.stack([sigma[t] for t in steps]))
        theirs.compare(f"sn_{name}_trace", torch.stack([sigma[t] for t in range(30)]))
        for t in steps[1:]:
            theirs.compare(f"sn_{name}_vec{t}", vectors[t])
        for t in (2, 250):
            (slope,) = torch.autograd.grad(sigma[t], w)
            theirs.compare(f"sn_{name}_dsigma{t}", slope)
        divided_by = w.norm() / norm.eval()(w).norm()
        assert divided_by.item() == pytest.approx(theirs.array(f"sn_{name}_sigma")[-1], rel=1e-8)


# --- smmd.npz: smmd_gan.py and kernels ---------------------------------------------------------------

MIXTURES = {
    "mixrbf": ("rbf", (2.0, 5.0, 10.0, 20.0, 40.0, 80.0)),
    "rbf": ("rbf", SIGMA_1),
    "mixrq": ("rq", ALPHA_3),
    "rq5": ("rq", ALPHA_5),
    "rq1dot": ("rq-linear", ALPHA_3),
    "rq5dot": ("rq-linear", ALPHA_5),
    "dot": ("linear", ()),
}


def test_kernels(theirs):
    for data in "abc":
        x, y = theirs.variable(f"{data}_x"), theirs.variable(f"{data}_y")
        for name, (kernel, bandwidths) in MIXTURES.items():
            gram = kernels.gram_blocks(x, y, kernel, bandwidths)
            for estimator in ("unbiased", "biased"):
                if kernel == "rq-linear" and estimator == "unbiased":
                    continue  # test_rq_linear_as_coded
                key = f"{data}_{name}_{estimator}"
                theirs.compare_with_gradients(key, kernels.mmd2(*gram, estimator), x=x, y=y)
                fused = kernels.fused_mmd2(x, y, kernel, bandwidths, estimator)
                theirs.compare_with_gradients(key, fused, x=x, y=y)


def test_rq_linear_as_coded(theirs):
    """Known difference 6: they take the constant part of the diagonal off, not that of <a, b>."""
    ours = []
    for data in "abc":
        x, y = theirs.variable(f"{data}_x"), theirs.variable(f"{data}_y")
        for name in ("rq1dot", "rq5dot"):
            args = smmd_gan.Args(kernel="rq-linear", bandwidths=MIXTURES[name][1], as_coded=True)
            gram = kernels.gram_blocks(x, y, args.kernel, args.bandwidths)
            coded = smmd_gan.squared_mmd(*gram, args)
            theirs.compare_with_gradients(f"{data}_{name}_unbiased", coded, x=x, y=y)
            if name == "rq1dot":
                args.as_coded = False
                ours.append(smmd_gan.squared_mmd(*gram, args).item())
    assert ours == pytest.approx([0.4796, 0.3063, 0.7922], abs=5e-5)
    coded = [theirs.array(f"{data}_rq1dot_unbiased") for data in "abc"]
    assert coded == pytest.approx([0.5799, 0.7287, 2.0846], abs=5e-5)


def test_distance_kernel(theirs):
    """Known difference 5: they add e = 1e-5 under each root; a has points that are nearer than 3e-3."""
    e = 1e-5
    sizes = {"a": (7.93e-5, 3.30e-2), "b": (1.01e-6, 9.84e-7), "c": (2.17e-7, 1.29e-6)}  # value, gradient
    for data in "abc":
        x, y = theirs.variable(f"{data}_x"), theirs.variable(f"{data}_y")
        with_e = [-(d2 + e).sqrt() for d2 in kernels.squared_distance_blocks(x, y)]
        without = kernels.gram_blocks(x, y, "distance", ())
        for estimator in ("unbiased", "biased"):
            key = f"{data}_distance_{estimator}"
            theirs.compare_with_gradients(key, kernels.mmd2(*with_e, estimator), x=x, y=y)
            ours = kernels.mmd2(*without, estimator)
            if estimator == "biased":  # their diagonal is -sqrt(e), ours 0
                ours = ours - e**0.5 * (1 / len(x) + 1 / len(y))
            assert theirs.difference(key, ours) < 1e-4
            if estimator == "unbiased":
                (slope,) = torch.autograd.grad(ours, x, retain_graph=True)
                found = theirs.difference(key, ours), theirs.difference(f"{key}_gx", slope)
                assert found == pytest.approx(sizes[data], rel=0.01)


def test_scaled_mmd(theirs):
    """Of a tiny critic: leaky_0.2 of a convolution of two channels to three, then linear to d features."""
    names = ("conv_w", "conv_b", "lin_w", "lin_b")
    cases = {
        "smmd1": (dict(constraint="scaled", kernel="rbf", bandwidths=SIGMA_1), 10.0),
        "smmd3": (dict(constraint="scaled", kernel="rbf", bandwidths=SIGMA_1), 10.0),
        "smmdrq1": (dict(constraint="scaled", kernel="rq", bandwidths=ALPHA_3), 10.0),
        "smmdrq3": (dict(constraint="scaled", kernel="rq", bandwidths=ALPHA_3), 10.0),
        "smmdlam11": (dict(constraint="scaled", kernel="rbf", bandwidths=SIGMA_1), 1.0),
        "smmdlam13": (dict(constraint="scaled", kernel="rbf", bandwidths=SIGMA_1), 1.0),
        # The rbf kernel with the scale that has ||phi||^2 in it, which of our constraints only swgan has.
        "smmdval1": (dict(constraint="swgan", kernel="rbf", bandwidths=SIGMA_1), 10.0),
        "swgan1": (dict(constraint="swgan", kernel="linear", bandwidths=SIGMA_1), 10.0),
    }
    for case, (options, lambda_scale) in cases.items():
        d = case[-1]
        parameters = {name: theirs.variable(f"net{d}_{name}") for name in names}
        conv_w, conv_b, lin_w, lin_b = parameters.values()
        real, fake = theirs.variable("img_real"), theirs.variable("img_fake")
        feats = []
        for images in (real, fake):
            hidden = F.leaky_relu(F.conv2d(images, conv_w, conv_b, padding=1), 0.2)
            feats.append(hidden.flatten(1) @ lin_w.T + lin_b)
        real_feat, fake_feat = feats
        theirs.compare(f"{case}_feat_real", real_feat)
        theirs.compare(f"{case}_feat_fake", fake_feat)
        theirs.compare(f"{case}_jac2", smmd_gan.jacobian_norm2(real_feat, real, False).mean())

        args = smmd_gan.Args(**options, lambda_scale=lambda_scale)
        scale = smmd_gan.distance_scale(real_feat, real, args, create_graph=True)
        scale2 = scale.square() if args.constraint == "swgan" else scale
        theirs.compare_with_gradients(f"{case}_scale2", scale2, **parameters)

        if case == "swgan1":
            distance = real_feat.mean() - fake_feat.mean()
        else:
            gram = kernels.gram_blocks(real_feat, fake_feat, args.kernel, args.bandwidths)
            distance = kernels.mmd2(*gram, "unbiased")
        factor = scale if case == "swgan1" else scale2
        theirs.compare_with_gradients(f"{case}_cri", smmd_gan.critic_loss(distance, factor), **parameters)
        g_loss = smmd_gan.generator_loss(distance, factor.detach())
        theirs.compare_with_gradients(f"{case}_gen", g_loss, fake=fake)


PENALTIES = {  # the penalty on the whole norm (ours), and as coded
    "gpbin_mix_rq_1dot": (0.1247, 0.3526),
    "gparb_mix_rq_1dot": (0.1247, 0.5324),
    "gpbin_mix_rq": (0.1724, 0.5610),
    "gparb_mix_rq": (0.1724, 0.6943),
}


def test_gradient_penalty_of_smmd(theirs):
    """Known difference 4: the norm over axis 1, rows in [B]'s code (gpbin), channels in Arbel's (gparb).

    gpflat: images of which that axis is the only one, so that theirs is the norm of the whole gradient.
    """
    u = theirs.tensor("gp_u")[:, None, None, None]
    images = theirs.variable("img_real"), theirs.variable("img_fake")
    points = theirs.variable("flat_real"), theirs.variable("flat_fake")
    conv = {name: theirs.variable(f"net3_{name}") for name in ("conv_w", "conv_b", "lin_w", "lin_b")}
    dense = {name: theirs.variable(f"flat_{name}") for name in ("w1", "b1", "w2", "b2")}

    def conv_critic(x):
        hidden = F.leaky_relu(F.conv2d(x, conv["conv_w"], conv["conv_b"], padding=1), 0.2)
        return [hidden, hidden.flatten(1) @ conv["lin_w"].T + conv["lin_b"]]

    def dense_critic(x):
        hidden = F.leaky_relu(x.flatten(1) @ dense["w1"].T + dense["b1"], 0.2)
        return [hidden, hidden @ dense["w2"].T + dense["b2"]]

    for kernel, name in (("rq-linear", "mix_rq_1dot"), ("rq", "mix_rq")):
        for code in ("gpbin", "gparb", "gpflat"):
            flat = code == "gpflat"
            critic, parameters = (dense_critic, dense) if flat else (conv_critic, conv)
            real, fake = points if flat else images
            real_out, fake_out = critic(real), critic(fake)
            m = (real + u.view(-1, *[1] * (real.ndim - 1)) * (fake - real)).detach()
            if code == "gparb":  # ours is of rows: of images whose rows and channels have changed places
                m = m.transpose(1, 2).contiguous().requires_grad_()
                m_feat = critic(m.transpose(1, 2))[-1]
            else:
                m_feat = critic(m.requires_grad_())[-1]

            args = smmd_gan.Args(constraint="gradient-penalty", kernel=kernel, bandwidths=ALPHA_3)
            whole = smmd_gan.gradient_penalty(m, m_feat, real_out[-1], fake_out[-1], args)
            args.as_coded = True
            penalty = smmd_gan.gradient_penalty(m, m_feat, real_out[-1], fake_out[-1], args)
            penalty = whole if flat else penalty
            activation = smmd_gan.activation_penalty(real_out, fake_out)
            gram = kernels.gram_blocks(real_out[-1], fake_out[-1], kernel, args.bandwidths)
            distance = smmd_gan.squared_mmd(*gram, args)
            c_loss = smmd_gan.critic_loss(distance, 1.0) + penalty + activation

            key = f"{code}_{name}"
            theirs.compare_with_gradients(f"{key}_penalty", penalty, **parameters)
            theirs.compare_with_gradients(f"{key}_activation", activation, **parameters)
            theirs.compare_with_gradients(f"{key}_cri", c_loss, **parameters)
            theirs.compare_with_gradients(f"{key}_gen", smmd_gan.generator_loss(distance, 1.0), fake=fake)
            if not flat:
                sizes = whole.item(), theirs.array(f"{key}_penalty")
                assert sizes == pytest.approx(PENALTIES[key], abs=5e-5)


def test_spectral_norm_of_smmd(theirs):
    """Vectors after 1, 2 and 20 iterations by hand; with these, what PyTorch's normalisation returns."""
    for name in ("conv", "lin"):
        w, target = theirs.tensor(f"sn_{name}_w"), theirs.tensor(f"sn_{name}_t")
        for steps in (1, 2, 20):
            layer = nn.Linear(12, 3) if name == "lin" else nn.Conv2d(2, 4, 3, 1, 1)
            layer.double().weight.data.copy_(w)
            critic = nn.Module()
            critic.layer, critic.weighted = layer, [layer]
            smmd_gan.normalise(critic, "pim", False)
            matrix, u = w.flatten(1), theirs.tensor(f"sn_{name}_u0")[0]
            for _ in range(steps):
                v = F.normalize(matrix.T @ u, dim=0)
                u = F.normalize(matrix @ v, dim=0)
            norm = layer.parametrizations.weight[0].parametrisation
            norm._u.copy_(u)
            norm._v.copy_(v)
            critic.eval()
            theirs.compare(f"sn_{name}_wbar{steps}", layer.weight)
            theirs.compare(f"sn_{name}_sigma{steps}", w.norm() / layer.weight.norm())
            loss = (layer.weight * target).sum()
            (gradient,) = torch.autograd.grad(loss, layer.parametrizations.weight.original)
            theirs.compare(f"sn_{name}_gw{steps}", gradient)


def test_kid(theirs):
    def kid(a, b):
        gram = [smmd_gan.cubic_kernel(*pair) for pair in ((a, a), (a, b), (b, b))]
        return kernels.mmd2(*gram, "unbiased")

    x, y = theirs.tensor("kid_x"), theirs.tensor("kid_y")
    theirs.compare("kid_full", kid(x, y))
    subsets = list(zip(theirs.array("kid_pick_x"), theirs.array("kid_pick_y")))
    theirs.compare("kid_blocks", torch.stack([kid(x[i], y[j]) for i, j in subsets]))
    # They estimate the variance for 48 samples from sums of the kernel, and half of their estimates from 16
    # samples are negative. Ours is a jackknife's, from the spread of subsets: it cannot be.
    assert (theirs.array("kid_blocks_var") < 0).sum() == 5
    _, our_error = evaluation.kernel_distance(x, y)
    assert our_error == pytest.approx(0.549, abs=5e-4)
    assert theirs.array("kid_full_var") ** 0.5 == pytest.approx(0.477, abs=5e-4)


def test_three_samples(theirs):
    """Known difference 7: at 48 samples their variance is 5% lower than ours; 16% where all are equal."""
    x = theirs.tensor("t3_x")
    for i in range(4):
        of_y, of_z = (smmd_gan.kernel_sums(x, theirs.tensor(f"t3_{name}{i}")) for name in "yz")
        difference = of_y["value"] - of_z["value"]
        theirs.compare(f"t3_diff{i}", difference)
        without_floor, _ = smmd_gan.three_sample_test(of_y, of_z, floor=1e-30)
        our_variance = (difference.item() / without_floor) ** 2
        variance_ratio = theirs.array(f"t3_var{i}") / our_variance
        assert variance_ratio == pytest.approx([0.953, 0.953, 0.845, 0.953][i], abs=1e-3)
        statistic, p = smmd_gan.three_sample_test(of_y, of_z)
        assert theirs.array(f"t3_stat{i}") / statistic == pytest.approx(variance_ratio**-0.5, rel=1e-9)
        assert theirs.array(f"t3_p{i}") == pytest.approx(p, abs=0.008)
        theirs.compare(f"t3_p{i}", torch.special.ndtr(theirs.tensor(f"t3_stat{i}")))


# --- mmd_gan.npz: mmd_gan.py -------------------------------------------------------------------------


def test_mmd_gan_losses(theirs):
    sigma = (1.0, 2.0, 4.0, 8.0, 16.0)
    for data, bound in (("a", 1e-9), ("b", 1e-9), ("c", 1e-8)):
        x, y = theirs.variable(f"{data}_x"), theirs.variable(f"{data}_y")
        gram = kernels.gram_blocks(x, y, "rbf", sigma)
        for estimator in ("biased", "unbiased"):
            key = f"{data}_mmd2_{estimator}"
            theirs.compare_with_gradients(key, kernels.mmd2(*gram, estimator), bound, x=x, y=y)
            fused = kernels.fused_mmd2(x, y, "rbf", sigma, estimator)
            theirs.compare_with_gradients(key, fused, bound, x=x, y=y)
        mmd, hinge = kernels.sqrt_mmd(*gram), mmd_gan.rank_hinge(x, y)
        theirs.compare_with_gradients(f"{data}_hinge", hinge, x=x, y=y)
        g_loss = mmd_gan.generator_loss(mmd, hinge, 16.0)
        theirs.compare_with_gradients(f"{data}_gen", g_loss, bound, x=x, y=y)
        c_loss = mmd_gan.critic_loss(mmd, hinge, torch.zeros(()), 16.0, 8.0)
        theirs.compare_with_gradients(f"{data}_gen", -c_loss, bound, x=x, y=y)
    theirs.compare("d_hinge", mmd_gan.rank_hinge(theirs.tensor("d_x"), theirs.tensor("d_y")))


def test_mmd_gan_training(theirs, monkeypatch, tmp_path):
    """15 critic and 3 generator updates: 5 critic updates, then 1 of the generator."""
    images = theirs.tensor("loop_images")
    rate, n_critic, clip, lambda_ae, lambda_rank = theirs.list("loop_settings")
    args = mmd_gan.Args(
        dataset="digits", image_size=16, batch_size=16, width=4, feature_dim=4, latent_dim=4, total_steps=3,
        n_critic=int(n_critic), warmup_critic=int(n_critic), learning_rate=rate, critic_learning_rate=rate,
        clip=clip, lambda_ae=lambda_ae, lambda_rank=lambda_rank,
    )  # fmt: skip

    def parts(models):
        critic = models["critic"]
        return {"gen": models["generator"], "enc": critic.layers, "dec": critic.decoder}

    def initialise(models):
        parameters = [p for part in parts(models).values() for p in part.parameters()]
        assert [p.numel() for p in parameters] == theirs.list("loop_param_sizes")
        for short, part in parts(models).items():
            set_weights(part, theirs.array(f"loop_{short}_0"))

    c_losses, g_losses = [], []
    critic_loss, generator_loss = mmd_gan.critic_loss, mmd_gan.generator_loss

    def noted_critic_loss(mmd, hinge, ae_loss, *weights):
        value = critic_loss(mmd, hinge, ae_loss, *weights)
        c_losses.append(torch.stack([value, mmd**2, hinge, ae_loss]))
        return value

    def noted_generator_loss(mmd, hinge, *weights):
        value = generator_loss(mmd, hinge, *weights)
        g_losses.append(torch.stack([value, mmd**2, hinge]))
        return value

    monkeypatch.setattr(mmd_gan, "critic_loss", noted_critic_loss)
    monkeypatch.setattr(mmd_gan, "generator_loss", noted_generator_loss)
    data = Given("digits", images * (2 / 255) - 1, (-1.0, 1.0))
    noises = theirs.tensor("loop_noise")
    after_steps = train(mmd_gan, args, data, noises, initialise, monkeypatch, tmp_path)

    players = {"c": "c_optimizer", "g": "g_optimizer"}
    assert [name for name, _ in after_steps] == (["c_optimizer"] * 5 + ["g_optimizer"]) * 3
    for player, updates in (("c", (1, 2, 5)), ("g", (1, 2, 3))):
        states = [models for name, models in after_steps if name == players[player]]
        for update in updates:
            models = states[update - 1]
            for short, part in parts(models).items():
                if player == "g" or short != "gen":
                    theirs.compare(f"loop_{short}_{player}{update}", weights(part), 1e-6)
            if player == "g":
                norms = [m for m in models["generator"].modules() if isinstance(m, nn.BatchNorm2d)]
                running = torch.cat([v for m in norms for v in (m.running_mean, m.running_var)])
                theirs.compare(f"loop_gen_running_g{update}", running)
    # Their two errors of reconstruction, of real and of fake images, are one number in ours: their sum.
    wanted = theirs.array("loop_critic_losses")
    theirs.arrays["loop_critic_losses"] = np.column_stack([wanted[:, :3], wanted[:, 3:].sum(1)])
    theirs.compare("loop_critic_losses", torch.stack(c_losses), 1e-6)
    theirs.compare("loop_gen_losses", torch.stack(g_losses), 1e-6)


# --- gmmn.npz: gmmn.py -------------------------------------------------------------------------------


def test_gmmn_loss(theirs):
    """Their bandwidths are variances; known difference 8: they divide by 2 sqrt(MMD^2) + 1e-10."""
    for name in ("pixel", "code", "tfdpixel", "tfdcode"):
        x, y = theirs.tensor(f"{name}_x"), theirs.variable(f"{name}_y")
        sigma = tuple(variance**0.5 for variance in theirs.list(f"{name}_variances"))
        fused = gmmn.generator_loss(x, y, "rbf", sigma)
        plain = kernels.sqrt_mmd(*kernels.gram_blocks(x, y, "rbf", sigma))
        for loss in (fused, plain):
            theirs.compare(f"{name}_loss", loss)
            theirs.compare(f"{name}_gy", torch.autograd.grad(loss, y)[0])
    published = [sigma**2 for sigma in gmmn.DEFAULTS["images"]["bandwidths"]]
    assert published == pytest.approx(theirs.list("pixel_variances"), rel=1e-12)


def transposed(vector, sizes):
    """Return weights (in, out) and biases of dense layers of these sizes, the weights as (out, in)."""
    parts, i = [], 0
    for a, b in zip(sizes, sizes[1:]):
        parts += [vector[i : i + a * b].reshape(a, b).T.ravel(), vector[i + a * b : i + a * b + b]]
        i += a * b + b
    return np.concatenate(parts)


def train_gmmn(theirs, name, monkeypatch, tmp_path):
    """Train as theirs did, and compare the weights after each update."""
    sizes = theirs.list("sgd_sizes")
    rate, momentum, drop, steps = theirs.list(f"{name}_settings")
    batches = theirs.tensor(f"{name}_batches").view(int(steps), 20, 1, 4, 4)
    args = gmmn.Args(
        dataset="digits", batch_size=20, width=sizes[-2], latent_dim=sizes[0], total_steps=int(steps),
        drop_step=int(drop), learning_rate=rate, momentum=momentum, optimizer="sgd",
    )  # fmt: skip
    args.bandwidths = gmmn.DEFAULTS["images"]["bandwidths"]

    def initialise(models):
        set_weights(models["generator"], transposed(theirs.array(f"{name}_w0"), sizes))

    data, noises = Given("digits", batches, (0.0, 1.0)), theirs.tensor(f"{name}_noise")
    after_steps = train(gmmn, args, data, noises, initialise, monkeypatch, tmp_path)
    assert len(after_steps) == steps
    for update, (_, models) in enumerate(after_steps, 1):
        key = f"{name}_w{update}"
        theirs.arrays[key] = transposed(theirs.array(key), sizes)
        theirs.compare(key, weights(models["generator"]))


def test_gmmn_training(theirs, monkeypatch, tmp_path):
    train_gmmn(theirs, "sgd", monkeypatch, tmp_path)


def test_gmmn_drop_of_the_rate(theirs, monkeypatch, tmp_path):
    """The rate is in their velocity, and that of the updates before the drop stays in it."""
    train_gmmn(theirs, "sgddrop", monkeypatch, tmp_path)


# --- gram.npz: gram_net.py ---------------------------------------------------------------------------


def gram_inputs(theirs, data):
    """Return real and fake features, the bandwidths, and the ratio of each bandwidth, (S, n)."""
    real, fake = theirs.variable(f"{data}_real"), theirs.variable(f"{data}_fake")
    sigmas = tuple(theirs.list(f"{data}_sigmas"))
    _, d2_xy, d2_yy = kernels.squared_distance_blocks(real, fake)
    k_xy, k_yy = (torch.stack([kernels.rbf(d2, (s,)) for s in sigmas]) for d2 in (d2_xy, d2_yy))
    return real, fake, sigmas, gram_net.density_ratio(k_yy, k_xy.mT, 1e-3)


def test_ratio_and_losses_of_julia(theirs):
    for data in "abc":
        real, fake, sigmas, ratios = gram_inputs(theirs, data)
        for positivity, mark in (("sum", ""), ("clip", "clip_")):
            args = gram_net.Args(
                bandwidths=sigmas, positivity=positivity, positivity_weight=1.0, ridge=1e-3, as_coded="julia"
            )
            c_loss, g_loss, _ = gram_net.losses(real, fake, args)
            ratio = ratios.mean(0).clamp_min(0) if mark else ratios.mean(0)
            theirs.compare(f"{data}_J_{mark}ratio", ratio)
            theirs.compare(f"{data}_J_{mark}pearson", gram_net.pearson_divergence(ratio))
            theirs.compare(f"{data}_J_{mark}sum", ratio.sum())
            key = f"{data}_J_{mark}cri"
            theirs.compare_with_gradients(key, c_loss, 1e-8, real=real, fake=fake)
            theirs.compare(f"{data}_J_{mark}gen", g_loss)
        theirs.compare_with_gradients(f"{data}_J_gen", g_loss, real=real, fake=fake)


def test_ratio_and_losses_of_torch(theirs):
    """Known difference 9: their ratio is a sum over the bandwidths, not a mean."""
    for data in "abc":
        real, fake, sigmas, ratios = gram_inputs(theirs, data)
        for i, ratio in enumerate(ratios):
            theirs.compare(f"{data}_T_ratio_sigma{i}", ratio)
        for positivity, mark in (("sum", ""), ("clip", "clip_")):
            ratio = ratios.sum(0).clamp_min(0) if mark else ratios.sum(0)
            theirs.compare(f"{data}_T_{mark}ratio", ratio)
            theirs.compare(f"{data}_T_{mark}pearson", gram_net.pearson_divergence(ratio))
            theirs.compare(f"{data}_T_{mark}sum", ratio.sum())
            c_loss = gram_net.critic_loss(ratios.sum(0), positivity, 1.0)
            key = f"{data}_T_{mark}cri"
            theirs.compare_with_gradients(key, c_loss, 1e-8, real=real, fake=fake)
        args = gram_net.Args(bandwidths=sigmas, positivity="sum", positivity_weight=1.0, ridge=1e-3)
        _, g_loss, _ = gram_net.losses(real, fake, args)
        theirs.compare(f"{data}_T_mmdsq", g_loss)
        # Known difference 8: their generator minimises the root of the MMD^2, as --as-coded julia does.
        theirs.compare_with_gradients(f"{data}_T_gen", g_loss.sqrt(), real=real, fake=fake)
        theirs.compare(f"{data}_T_clip_gen", g_loss.sqrt())


def test_gram_training(theirs, monkeypatch, tmp_path):
    """Five simultaneous updates by Adam: sq has MMD^2 for the generator, sqrt its root, as they have it."""
    rate, beta1, beta2, sigma, ridge = theirs.list("step_settings")
    real, losses_of_ours = theirs.tensor("step_real"), gram_net.losses
    parts = {"g": "generator", "f": "critic"}

    def initialise(models):
        for short, part in parts.items():
            for i, p in enumerate(models[part].parameters()):
                p.data.copy_(theirs.tensor(f"step_{short}{i}"))

    for form, as_coded in (("sq", None), ("sqrt", "julia")):
        args = gram_net.Args(
            dataset="ring3d", batch_size=24, width=8, feature_dim=2, latent_dim=2, total_steps=5,
            bandwidths=(sigma,), learning_rate=rate, critic_learning_rate=rate, beta1=beta1, beta2=beta2,
            ridge=ridge, as_coded=as_coded,
        )  # fmt: skip
        found = []

        def noted_losses(*inputs):
            c_loss, g_loss, logged = losses_of_ours(*inputs)
            found.append(torch.stack([c_loss, g_loss]))  # noqa: B023
            return c_loss, g_loss, logged

        monkeypatch.setattr(gram_net, "losses", noted_losses)
        data, noises = Given("ring3d", real, (-1.0, 1.0)), theirs.tensor("step_noise")
        after_steps = train(gram_net, args, data, noises, initialise, monkeypatch, tmp_path)
        theirs.compare(f"step_{form}_losses", torch.stack(found), 1e-8)
        for update in (1, 5):
            _, models = after_steps[2 * update - 1]
            for short, part in parts.items():
                for i, p in enumerate(models[part].parameters()):
                    # No kernel sees the critic's last bias: its gradient is 0, and Adam follows the rounding.
                    bound = 1e-5 if (short, i) == ("f", 5) else 1e-8
                    theirs.compare(f"step_{form}_{short}{i}_after{update}", p, bound)
