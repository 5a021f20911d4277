"""What a GPU would refuse, found on PyTorch's meta device; and what a GPU gives, where there is one.

The meta device has shapes but no values: it refuses tensors of two devices, and any read of a value.
"""

import contextlib
from importlib import import_module

import pytest
import torch
from test_hot_loop import CASES

from common import run

SMALL = ["--width", "16", "--batch-size", "16", "--eval-every", "0", "--ema-decay", "0.9"]
AUTOENCODER = "gmmn --autoencoder --ae-steps 1"  # how far it has come is read, before the first step


class Updated(Exception):
    """Raised after the first update of a generator: what follows reads values."""


class Recorder(run.Silent):
    def __init__(self):
        self.losses = []

    def add_scalar(self, tag, value, step):
        if tag.startswith("losses/"):
            self.losses.append((tag, step, float(torch.as_tensor(value).detach())))


def one_update_on_meta(case, tmp_path, monkeypatch):
    script, *options = case.split()
    module = import_module(script)

    def note(self, step, **losses):
        if "generator" in losses:
            assert all(loss.device.type == "meta" for loss in losses.values())
            raise Updated

    monkeypatch.setattr(run, "start", lambda _: (torch.device("meta"), 0, 1))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(run, "make_folder", lambda *_: tmp_path)
    monkeypatch.setattr(run, "make_writer", lambda *_: run.Silent())
    monkeypatch.setattr(run, "save_checkpoint", lambda *_: None)  # which reads, and may
    monkeypatch.setattr(run.Finite, "note", note)
    options = [*SMALL, "--total-steps", "2", "--log-every", "0", *options]
    module.train(run.parse(module.Args, options))


@pytest.mark.parametrize("case", CASES)
def test_an_update_on_the_meta_device(case, tmp_path, monkeypatch):
    with pytest.raises(Updated):
        one_update_on_meta(case, tmp_path, monkeypatch)


@pytest.mark.parametrize("fault", ["another device", "a value that is read"])
def test_the_meta_device_refuses(fault, tmp_path, monkeypatch):
    module = import_module("mmd_gan_repulsive")
    draw, loss = module.draw_noise, module.generator_loss
    if fault == "another device":
        monkeypatch.setattr(module, "draw_noise", lambda n, args, device: draw(n, args, "cpu"))
    else:
        monkeypatch.setattr(module, "generator_loss", lambda *given: loss(*given) * (loss(*given).item() > 0))
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        one_update_on_meta("mmd_gan_repulsive", tmp_path, monkeypatch)


# --- with a GPU ------------------------------------------------------------------------------------


def on_the_cpu(draw):
    return lambda *shape, device=None, **options: draw(*shape, **options).to(device)


def losses(case, device, tmp_path, monkeypatch):
    """The losses of 20 steps, as {tag: (20,)}; noise is drawn on the CPU, so that it is the same."""
    script, *options = case.split()
    module, writer = import_module(script), Recorder()
    with monkeypatch.context() as patch:
        for name in ("rand", "randn"):
            patch.setattr(torch, name, on_the_cpu(getattr(torch, name)))
        patch.setattr(run, "make_writer", lambda *_: writer)
        options = [*SMALL, "--total-steps", "20", "--log-every", "1", "--device", device, *options]
        module.train(run.parse(module.Args, [*options, "--runs-dir", str(tmp_path)]))
    tags = {tag for tag, _, _ in writer.losses}
    return {tag: torch.tensor([value for name, _, value in writer.losses if name == tag]) for tag in tags}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [*CASES, AUTOENCODER])
@pytest.mark.parametrize(
    ("options", "tolerance"), [("", 0.02), ("--precision bf16", 0.3), ("--compile", 0.02)], ids=str
)
def test_losses_on_a_gpu_are_those_on_a_cpu(case, options, tolerance, tmp_path, monkeypatch):
    """Up to rounding, which 20 updates make more of: tolerance is a share of the largest loss."""
    expected = losses(case, "cpu", tmp_path, monkeypatch)
    found = losses(f"{case} {options}", "cuda", tmp_path, monkeypatch)
    assert found.keys() == expected.keys()
    for tag, values in expected.items():
        assert len(values) > 0
        torch.testing.assert_close(found[tag], values, rtol=0, atol=tolerance * values.abs().max().item())
