"""Several processes train one model: its losses and gradients are those of one process with the whole batch.

The processes are forked from a server that has imported everything, and meet over gloo.
"""

import contextlib
import copy
import datetime
import io
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from common import datasets, kernels, run

ROOT = Path(__file__).parent.parent
SCRIPTS = [*sorted(path.stem for path in ROOT.glob("*.py")), "baselines.gan", "baselines.wgan"]


def spawn(function, world, folder):
    """Call function(rank, world, folder) in that many processes; what one of them raises is raised here."""
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([*SCRIPTS, __name__])
    arguments = function, world, str(folder)
    torch.multiprocessing.start_processes(enter, arguments, world, start_method="forkserver")


def enter(rank, function, world, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    if world > 1:
        meeting, limit = f"file://{folder}/meeting-{world}", datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=limit)
    function(rank, world, Path(folder))
    if world > 1:
        dist.destroy_process_group()


# --- loss and gradient -----------------------------------------------------------------------------

BATCH = 12
# Networks without batch norm. The critics' losses with a gradient in them are differentiated twice.
CASES = [
    ("smmd_gan", dict(feature_dim=2)),
    ("smmd_gan", dict(scale_form="poster", critic_norm="pim", clip_norm=0.01)),
    ("smmd_gan", dict(constraint="swgan")),
    ("smmd_gan", dict(constraint="gradient-penalty")),
    ("gamn", dict(data_mmd_weight=0.5)),
    ("gamn", dict(regularizer="l1")),
    ("mmd_gan_repulsive", dict(kernel="rbf-b")),
    ("mmd_gan_repulsive", dict(lambda_gp=0.1, critic_norm="none")),
    ("mmd_gan_repulsive", dict(loss="hinge")),
    ("gram_net", dict(dataset="ring3d")),
    ("gram_net", dict(dataset="ring3d", as_coded="notebook")),
    ("mmd_gan", dict(lambda_rank=2.0)),
    ("baselines.gan", dict(loss="hinge", critic_norm="pim")),
    ("baselines.wgan", {}),
    ("baselines.wgan", dict(constraint="sobolev", rho=0.5)),
    ("gmmn", {}),
    ("gmmn", dict(dataset="digits", autoencoder=True, ae_steps=1)),
]
METHOD = {"smmd_gan": dict(warmup_critic=2), "mmd_gan": dict(warmup_critic=2), "gamn": dict(n_critic=2)}


class Recorder(run.Silent):
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value.item() if isinstance(value, torch.Tensor) else value


def start_away_from_0(norm):
    """Set scale and shift of a layer norm so that no small step changes a sign, which gamn's l1 sees.

    A shift of units that are active for every sample moves no MMD: its gradient is rounding, and Adam makes a
    step of that.
    """
    nn.init.ones_(norm.weight)
    nn.init.constant_(norm.bias, 0.5)


def observe_all(rank, world, folder):
    """Save the gradients of every update, the scalars that are logged, and the weights, of every case.

    In float64; noise, dropout and interpolation are drawn for the whole batch; a process keeps its rows.
    """

    def rows(draw):
        local = BATCH // world
        return lambda n, *shape, **options: (
            draw(BATCH, *shape, **options)[rank * local :][:local]
            if n == local
            else draw(n, *shape, **options)
        )

    mix = run.mix
    assert mix(1, 0, 1, 0) != mix(1, 0, 1, 1)
    run.mix = lambda *numbers: mix(*numbers[:3])  # one seed for all processes, since each draws for all
    torch.Tensor.float, torch.rand, torch.randn = torch.Tensor.double, rows(torch.rand), rows(torch.randn)
    torch.set_default_dtype(torch.float64)
    nn.GroupNorm.reset_parameters = start_away_from_0
    images = torch.randint(256, (24, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    datasets.load_images = lambda *_: images
    (folder / "samples").mkdir(exist_ok=True)
    run.make_folder = lambda *_: folder

    grads, states, writer, found = [], [], None, []

    @register_optimizer_step_pre_hook
    def note(optimizer, *_):
        grads.append([p.grad.clone() for p in optimizer.param_groups[0]["params"] if p.grad is not None])

    def save(folder, args, script, step, models, rank):
        run.check_replicas(models, step)
        states[:] = [
            p.detach().clone() for m in models.values() if isinstance(m, nn.Module) for p in m.parameters()
        ]

    run.save_checkpoint = save
    for name, options in CASES:
        script = import_module(name)
        script.draw_picture = lambda path, *_: Image.new("RGB", (1, 1)).save(path)
        script.AE_BATCH = BATCH
        values = dict(dataset="8gaussians", batch_size=BATCH, width=16, total_steps=1, eval_every=0)
        grads.clear()
        run.make_writer = lambda *_: writer  # noqa: B023
        writer = Recorder()
        script.train(script.Args(**values | METHOD.get(name, {}) | options, log_every=1, device="cpu"))
        writer.scalars = {key: value for key, value in writer.scalars.items() if "per_second" not in key[0]}
        found.append({"grads": [*grads], "scalars": writer.scalars, "weights": [*states]})
    torch.save(found, folder / f"{world}-{rank}.pt")


def test_losses_and_gradients_are_those_of_one_process(tmp_path):
    for world in (1, 2, 3):
        spawn(observe_all, world, tmp_path)
    (one,), two, three = (
        [torch.load(tmp_path / f"{world}-{rank}.pt") for rank in range(world)] for world in (1, 2, 3)
    )
    for found in (*two, *three):
        for case, expected, got in zip(CASES, one, found, strict=True):
            assert expected["scalars"].keys() == got["scalars"].keys()
            for tag, value in expected["scalars"].items():
                assert got["scalars"][tag] == pytest.approx(value, rel=1e-12, abs=1e-12), (case, tag)
            for a, b in zip(expected["grads"], got["grads"], strict=True):  # of one update each
                size = max(grad.abs().max().item() for grad in a)
                assert size > 1e-6, case
                for p, q in zip(a, b, strict=True):
                    assert (p - q).abs().max().item() <= 1e-12 * max(size, 1), case
    for first, *others in (*zip(*two), *zip(*three)):
        assert all(same(first["weights"], other["weights"]) for other in others)


def same(a, b):
    pairs = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


# --- what two processes do together ----------------------------------------------------------------

SMALL = ["--width", "16", "--batch-size", "8", "--log-every", "1", "--eval-samples", "32", "--device", "cpu"]
SMALL += ["--save-every", "1", "--eval-every", "0"]


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def resumes_bit_for_bit(rank, world, folder):
    """N + M steps = N, stop, resume, M; batch norm is each process's own, and said to be, once."""
    import mmd_gan as script

    def train(*options):
        with contextlib.redirect_stdout(io.StringIO()) as text:
            script.train(run.parse(script.Args, [*map(str, options)]))
        dist.barrier()
        return text.getvalue()

    noise, draw_noise = [], script.draw_noise
    script.draw_noise = lambda *args: noise.append(draw_noise(*args)) or noise[-1]
    image = ["--image-size", "16", "--warmup-critic", "2", *SMALL]
    said = train(*image, "--total-steps", "4", "--runs-dir", folder / "a")
    assert said.count("batch norm takes each process's own batch") == (rank == 0)
    train(*image, "--total-steps", "2", "--runs-dir", folder / "b")
    (whole,), (part,) = (folder / "a").iterdir(), (folder / "b").iterdir()  # those of the first process
    assert checkpoint(part)["step"] == 2
    train("--resume", part, "--total-steps", "4")
    a, b = checkpoint(whole), checkpoint(part)
    assert all(same(a[key], b[key]) for key in a if key != "args")

    both = [None] * world
    dist.all_gather_object(both, noise[0])
    assert not torch.equal(*both)  # each has its own

    def forbidden(*args, **kwargs):
        raise AssertionError("only the first process writes")

    if rank > 0:
        np.savez = forbidden
    train("--resume", part, "--eval-only", "--eval-features", "pixels")
    with np.load(part / "samples.npz") as samples:
        assert samples["samples"].shape == (32, 16, 16, 1)


def replicas_are_compared(rank, world, folder):
    torch.manual_seed(0)
    models, args = {"generator": nn.Linear(3, 2)}, import_module("gmmn").Args(total_steps=7)
    run.check_replicas(models, 0)
    if rank == 1:
        models["generator"].weight.data[1, 2] *= 1 + 2**-23  # the last bit
    with pytest.raises(run.Failed, match="weights of the processes differ at step 7"):
        run.save_checkpoint(folder / "c", args, "gmmn", 7, models, rank)
    args.resume = str(folder / "c")  # and at the start of a resumed run
    if rank == 0:
        (folder / "c").mkdir()
        state = {"script": "gmmn", "args": vars(args), "step": 7}
        state |= {"generator": models["generator"].state_dict()}
        torch.save(state, folder / "c" / "checkpoint.pt")
    dist.barrier()
    assert run.load_checkpoint(args, "gmmn", models) == 7
    models["generator"].load_state_dict = lambda state: None if rank else state
    models["generator"].bias.data += rank
    with pytest.raises(run.Failed, match="differ at step 7"):
        run.load_checkpoint(args, "gmmn", models)


def batch_norm_is_synchronised_on_gpus_but_not_in_sampling(rank, world, folder):
    import mmd_gan as script

    torch.manual_seed(0)
    plain = script.Generator((1, 16, 16), 3, 4)
    models = {"generator": copy.deepcopy(plain), "g_optimizer": None}
    before, z = [*models["generator"].parameters()], torch.randn(5, 3)
    run.prepare(models, torch.device("cuda"))
    generator = models["generator"]
    norms = [m for m in generator.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 2
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert all(p is q for p, q in zip(generator.parameters(), before, strict=True))  # the optimiser's
    assert generator.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(ValueError, match="GPU"):  # it would wait for the others
        generator(z)
    if rank == 0:  # alone
        for mode in ("running", "batch"):
            expected = copy.deepcopy(plain).train(mode == "batch")(z)
            found = run.for_sampling(copy.deepcopy(generator), mode)(z)
            torch.testing.assert_close(found, expected)
    dist.barrier()


def all_stop_when_one_is_asked_to(rank, world, folder):
    run.SIGNALS[:] = [signal.SIGTERM] if rank == 1 else []
    assert not run.stop_asked(9)
    assert run.stop_asked(10)
    end = mock.patch.object(run, "end")  # there is more to come
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit) as exit_, end:
        run.leave(run.Silent(), folder, 10)
    assert exit_.value.code == 128 + signal.SIGTERM
    assert bool(text.getvalue()) == (rank == 0)
    run.SIGNALS.clear()
    assert not run.stop_asked(20)


def all_stop_when_one_cannot_write(rank, world, folder):
    """The first writes, and says what it could not; the others end with a status of their own."""
    run.FAILURES[:] = [OSError(28, "No space left on device")] if rank == 0 else []
    assert not run.stop_asked(9)
    assert run.stop_asked(10)
    expected = pytest.raises(run.Failed, match="No space left") if rank == 0 else pytest.raises(SystemExit)
    with expected, mock.patch.object(run, "end"):
        run.leave(run.Silent(), folder, 10)
    run.SIGNALS.clear()
    assert not run.stop_asked(20)


def gather_is_differentiated_twice(rank, world, folder):
    """Each process has a copy of the loss, and backward sums over them: N times the gradient, each time."""
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()

    def penalty(x, rows):
        joined = kernels.gather(x) if rows < 6 else x
        (grad,) = torch.autograd.grad((joined.T @ joined).square().sum(), x, create_graph=True)
        joined = kernels.gather(grad) if rows < 6 else grad
        return torch.autograd.grad(joined.square().sum(), x)[0]

    rows = 6 // world
    mine = x.detach()[rank * rows :][:rows].requires_grad_()
    # The first gradient enters squared, and the second is of the sum of the copies.
    torch.testing.assert_close(penalty(mine, rows), world**3 * penalty(x, 6)[rank * rows :][:rows])


def two(rank, world, folder):
    gather_is_differentiated_twice(rank, world, folder)
    resumes_bit_for_bit(rank, world, folder)
    replicas_are_compared(rank, world, folder)
    batch_norm_is_synchronised_on_gpus_but_not_in_sampling(rank, world, folder)
    all_stop_when_one_is_asked_to(rank, world, folder)
    all_stop_when_one_cannot_write(rank, world, folder)


def test_two_processes(tmp_path):
    spawn(two, 2, tmp_path)


# --- torchrun --------------------------------------------------------------------------------------


def torchrun(script, *options, **popen):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*command, str(script), *map(str, options)], env=environment, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["gmmn", "smmd_gan"])  # a minute each, of which most is imports
def test_torchrun_resumes_bit_for_bit(script, tmp_path):
    a, b = ["--runs-dir", tmp_path / "a", *SMALL], ["--runs-dir", tmp_path / "b", *SMALL]
    together = [torchrun(ROOT / f"{script}.py", *a, "--total-steps", "4")]
    together += [torchrun(ROOT / f"{script}.py", *b, "--total-steps", "2")]
    for process in together:
        assert process.communicate()[0].count("has what came out") == 1
        assert process.returncode == 0
    (whole,), (part,) = (tmp_path / "a").iterdir(), (tmp_path / "b").iterdir()
    process = torchrun(ROOT / f"{script}.py", "--resume", part, "--total-steps", "4")
    assert process.wait() == 0, process.stdout.read()
    a, b = checkpoint(whole), checkpoint(part)
    assert all(same(a[key], b[key]) for key in a if key != "args")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_the_others(rank, tmp_path):
    """At once, not after the half hour that they would wait for it; the checkpoint is the last good one."""
    failing = tmp_path / "failing.py"
    failing.write_text(
        "import mmd_gan\n"
        "from common import datasets, run\n"
        "batch = datasets.Images.batch\n"
        "def fails(self, i):\n"
        f"    if self.rank == {rank} and i == 7:\n"
        "        raise run.Failed('it broke')\n"
        "    return batch(self, i)\n"
        "datasets.Images.batch = fails\n"
        "run.main(mmd_gan.train, mmd_gan.Args)\n"
    )
    options = ["--runs-dir", tmp_path / "runs", *SMALL, "--warmup-critic", "2", "--total-steps", "1000"]
    began, process = time.time(), torchrun(failing, *options)
    text = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "error: it broke" in text
    assert time.time() - began < 60
    (folder,) = (tmp_path / "runs").iterdir()
    assert checkpoint(folder)["step"] == 2


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_stops(tmp_path):
    options = ["--runs-dir", tmp_path, *SMALL, "--save-every", "0", "--warmup-critic", "2"]
    process = torchrun(ROOT / "mmd_gan.py", *options, "--total-steps", "100000")
    while not [*tmp_path.glob("*/checkpoint.pt")]:
        time.sleep(0.1)
    time.sleep(5)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    (folder,) = tmp_path.iterdir()
    assert text.count(f"go on with --resume {folder}") == 1
    assert checkpoint(folder)["step"] % 10 == 0
    assert checkpoint(folder)["step"] > 0
