"""The machinery of a run that a reader skips: arguments, processes, run folder, checkpoint, signals."""

import contextlib
import dataclasses
import inspect
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import zipfile
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from filelock import FileLock, Timeout
from torch import nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

# What a resumed run may change; anything else would make it another run.
MAY_CHANGE = {
    "total_steps", "log_every", "sample_every", "save_every", "device", "compile", "runs_dir", "data_dir",
    "eval_every", "eval_samples", "eval_features", "eval_split", "eval_metrics", "eval_only",
    "inception_weights", "ms_ssim", "track", "resume",
}  # fmt: skip
# Bounds of arguments that several scripts have.
LOWER_BOUNDS = {
    "log_every": 0, "sample_every": 0, "eval_every": 0, "save_every": 0, "seed": 0,
    "beta1": 0, "beta2": 0, "momentum": 0, "ema_decay": 0,
    "total_steps": 1, "batch_size": 1, "width": 1, "eval_samples": 1, "image_size": 1,
    "n_critic": 1, "latent_dim": 1, "feature_dim": 1, "critic_width": 1,
    "learning_rate": 1e-15, "critic_learning_rate": 1e-15, "bandwidths": 1e-15,
}  # fmt: skip
BELOW_1 = math.nextafter(1, 0)
UPPER_BOUNDS = {
    "width": 2**14, "critic_width": 2**14, "feature_dim": 2**14, "latent_dim": 2**14, "image_size": 2**14,
    "seed": 2**63 - 1,
    "beta1": BELOW_1, "beta2": BELOW_1, "momentum": BELOW_1, "ema_decay": BELOW_1,
}  # fmt: skip
BATCH_NORM = nn.modules.batchnorm._BatchNorm  # all kinds
SIGNALS: list[int] = []  # that asked this process to stop
FAILURES: list[OSError] = []  # of writing what is not the checkpoint: they end the run once that is saved
LOCKS: list[FileLock] = []  # of run folders, until the process ends


class Stream(IntEnum):
    """What random numbers are for: the second argument of mix, so that no two uses draw the same."""

    STEP = 0  # noise, dropout and interpolation of one update
    SAMPLES = 1  # noise of what is evaluated and drawn
    AUTOENCODER = 2  # dropout of one update of GMMN's auto-encoder
    TOY_BATCH = 3  # the points of one batch
    EPOCH = 4  # the order of the images in one epoch
    TOY_REFERENCE = 5  # the points that a toy's samples are compared with
    TOY_SCALE = 6  # the points whose distances set the bandwidths of that comparison


class BadInput(Exception):
    """Something the user gave cannot be used. One line: what, the value, what would be right."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class Failed(Exception):
    """The run cannot go on, through no fault of the command line. One line."""


def require(ok: bool, what: str, value: object, expected: str) -> None:
    """Raise BadInput unless ok: require(n > 0, "--n-critic", n, "at least 1")."""
    if not ok:
        raise BadInput(f"{what} is {value}, but should be {expected}")


# --- arguments -----------------------------------------------------------------------------------


def main(train, args_class: type) -> None:
    """Parse the command line and train; an error is one line on stderr and an exit status.

    SIGTERM and Ctrl-C are noted, so that the step is finished and saved; a second one kills.
    """

    def note(number: int, frame: object) -> None:
        SIGNALS.append(number)
        signal.signal(number, signal.SIG_DFL)

    def report(failed) -> None:  # of a thread; TensorBoard's raises OSError in this one, too
        if not issubclass(failed.exc_type, OSError):
            threading.__excepthook__(failed)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    threading.excepthook = report
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, there may be none
    try:
        train(parse(args_class))
        end()
        sys.stdout.flush()
    except (BadInput, Failed, OSError) as error:
        give_up(error)
    finally:
        SIGNALS.clear()
        FAILURES.clear()
        threading.excepthook = threading.__excepthook__
        for number, handler in handlers.items():
            signal.signal(number, handler)


def give_up(error: Exception) -> None:
    """Print error as one line on stderr, and exit; what cannot be printed any more is dropped."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"error: {error}\n")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:  # a closed pipe, a full disk: Python would try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(2 if isinstance(error, BadInput) else 1)


def parse(args_class: type, argv: list[str] | None = None):
    """Return the arguments of a command line; with --resume, those of its run where none is given.

    What tyro cannot use it says itself, and exits with status 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = tyro.cli(args_class, args=argv)
    if args.resume:
        args = tyro.cli(args_class, args=argv, default=saved_arguments(args.resume, args_class))
    return args


def words(values: dict) -> list[str]:
    """Return arguments, given by name, as the words of a command line; None has none."""
    result = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            result.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, (tuple, list)):
            result += [f"--{flag}", *map(str, value)]
        elif value is not None:
            result += [f"--{flag}", str(value)]
    return result


def saved_arguments(folder: str, args_class: type):
    """Return the arguments of a run folder, with --resume; BadInput if they are not those of this script."""
    try:
        saved = json.loads(Path(folder, "args.json").read_text())
        with contextlib.redirect_stderr(io.StringIO()):
            saved = words(saved | {"resume": folder, "eval_only": False})
            return tyro.cli(args_class, args=saved, add_help=False)
    except (OSError, TypeError, AttributeError, ValueError, SystemExit) as error:
        problem = "args.json has other arguments" if isinstance(error, SystemExit) else error
        raise BadInput(f"--resume {folder}: not a run folder of this script ({problem})") from error


def command(args) -> str:
    """Return a command that starts this run: the script, and what differs from its defaults or its run's."""
    default = saved_arguments(args.resume, type(args)) if args.resume else type(args)()
    changed = {name: value for name, value in vars(args).items() if value != getattr(default, name)}
    if args.resume:
        changed = {"resume": args.resume} | changed
    processes = os.environ.get("WORLD_SIZE", "1")
    start = ["python"] if processes == "1" else ["torchrun", "--nproc-per-node", processes]
    file = Path(os.path.relpath(inspect.getfile(type(args))))
    program = [str(file)]
    if file.parent.name == "baselines":
        program = ["-m", f"baselines.{file.stem}"]  # as a module: it imports common
    return shlex.join([*start, *program, *words(changed)])


def resolve(args, *tables: dict, lower_bounds: dict[str, float] | None = None):
    """Return args with each None replaced from the tables, of which the last that has it counts, and checked.

    lower_bounds: those of the script's own arguments, beside those that are the same in every script.
    """
    defaults = {key: value for table in tables for key, value in table.items()}
    args = dataclasses.replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})
    bounds = LOWER_BOUNDS | (lower_bounds or {})
    for name, value in vars(args).items():
        flag, numbers = f"--{name.replace('_', '-')}", value if isinstance(value, tuple) else (value,)
        require(len(numbers) > 0, flag, value, "one number or more")
        readable = not isinstance(value, str) or value.encode(errors="ignore").decode() == value
        require(readable, flag, ascii(value), "a name in UTF-8, which TensorBoard needs")
        for number in numbers:
            if isinstance(number, (int, float)):
                low, high = bounds.get(name, -1e15), UPPER_BOUNDS.get(name, 1e15)  # their squares are floats
                require(number >= low, flag, value, f"at least {low}")
                require(number <= high, flag, value, f"at most {high}")
    if args.track:
        try:
            import wandb

            wandb.login()
        except Exception as error:
            raise BadInput(f"--track is on, but Weights & Biases cannot be used: {error}") from error
    require(not args.eval_only or args.resume, "--eval-only", "given alone", "given with --resume RUN")
    if "train_split" in defaults and (args.eval_every or args.eval_only):
        splits = args.train_split, args.eval_split
        published = splits == (defaults["train_split"], defaults["eval_split"])
        if not published and splits != ("train", "test") and os.environ.get("RANK", "0") == "0":
            print(f"warning: images of --eval-split {splits[1]} are trained on (--train-split {splits[0]})")
    return args


# --- processes and signals -----------------------------------------------------------------------


def start(device: str) -> tuple[torch.device, int, int]:
    """Return device, rank and world size; under torchrun, join the other processes first."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        raise BadInput(f"--device {name} cannot be used here, but cpu can: {problem}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # TF32 as PyTorch has it: in convolutions, not in products
    try:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if world_size > 1 and not dist.is_initialized():
            gpu = device.type == "cuda"
            dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    except (RuntimeError, ValueError) as error:
        problem = f"the processes do not find each other ({error})"
        raise BadInput(f"{problem}; torchrun sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT") from error
    return device, rank, world_size


def end() -> None:
    """Leave the other processes. Not after an error: they may be waiting, and NCCL would wait for them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def several() -> bool:
    """Return whether more than one process trains this model."""
    return dist.is_initialized() and dist.get_world_size() > 1


def prepare(models: dict, device: torch.device) -> None:
    """On GPUs, lay convolutions out channels last, and take batch norm's statistics from all processes.

    Neither is done on CPUs: double backwards are slower so, and PyTorch cannot; a line says the latter.
    """
    modules = [model for model in models.values() if isinstance(model, nn.Module)]
    parts = [part for module in modules for part in module.modules()]
    if device.type == "cuda":
        for module in modules:
            module.to(memory_format=torch.channels_last)
            if several():
                nn.SyncBatchNorm.convert_sync_batchnorm(module)  # in place: none is itself a batch norm
    elif several() and dist.get_rank() == 0 and any(isinstance(part, BATCH_NORM) for part in parts):
        print("batch norm takes each process's own batch: PyTorch synchronises it on GPUs only")


def for_sampling(module: nn.Module, sample_bn: str) -> nn.Module:
    """Put module in evaluation mode, with the statistics of the batch at hand for sample_bn = "batch".

    Those of this process alone: it may be the only one that samples, or have more batches than others.
    """
    for part in module.eval().modules():
        if sample_bn == "batch" and isinstance(part, BATCH_NORM):
            part.running_mean = part.running_var = None  # what is left is the batch
    return module


def check_replicas(models: dict, step: int) -> None:
    """Raise Failed, on every process, unless all of them hold the same weights to the bit."""
    if not several():
        return
    modules = [model for model in models.values() if isinstance(model, nn.Module)]
    bits = [p.detach().flatten().view(torch.int32).sum() for module in modules for p in module.parameters()]
    ends = torch.stack([torch.stack(bits), -torch.stack(bits)])
    dist.all_reduce(ends, dist.ReduceOp.MAX)  # largest, and minus the smallest
    if ends.sum(0).any():
        raise Failed(f"the weights of the processes differ at step {step}; --resume goes on from before")


def mix(*numbers: int) -> int:
    """Return a 63-bit seed on which every bit of every number has a bearing (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def failures_noted():
    """Note what cannot be written in this block: stop_asked then has the run saved, and leave ends it."""
    try:
        yield
    except OSError as error:
        FAILURES.append(error)


def raise_failure(remedy: str) -> None:
    """Raise Failed if something could not be written."""
    if FAILURES:
        error = FAILURES[0]
        FAILURES.clear()
        raise Failed(f"{error}; {remedy}")


def stop_asked(step: int) -> bool:
    """Return whether SIGTERM or Ctrl-C came, or something could not be written.

    Several processes agree on it, at every tenth step.
    """
    if not several():
        return bool(SIGNALS or FAILURES)
    if step % 10 > 0:
        return False
    number = max(SIGNALS, default=1 if FAILURES else 0)
    number = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(number, dist.ReduceOp.MAX)
    SIGNALS[:] = [number.item()] if number else []
    return bool(SIGNALS)


def finish(writer, folder: Path, args, rank: int) -> None:
    """Close the curves, and end standard output with where everything is."""
    with failures_noted():
        writer.close()
    raise_failure(f"the checkpoint in {folder} is whole")
    if rank == 0:
        print(f"{folder} has what came out; tensorboard --logdir {args.runs_dir} shows the curves")


def leave(writer, folder: Path, step: int) -> None:
    """Exit with the status that the signal has by convention, saying how to go on; Failed if none came."""
    with failures_noted():
        writer.close()
    raise_failure(f"step {step} is saved, and --resume {folder} goes on from there")
    if not several() or dist.get_rank() == 0:  # which alone knows the folder
        tqdm.write(f"stopped by signal {SIGNALS[0]} after step {step}; go on with --resume {folder}")
    end()
    sys.exit(128 + SIGNALS[0])


class Finite:
    """Remembers, on the device, the first step at which each loss was not finite: no step waits for it."""

    def __init__(self) -> None:
        self.first = {}  # name of a loss: that step, a tensor, or 0

    def note(self, step: int, **losses: torch.Tensor) -> None:
        """Look at the losses of a step, scalars given by name."""
        for name, loss in losses.items():
            first = self.first.setdefault(name, torch.zeros_like(loss, dtype=torch.int64))
            first.masked_fill_(~loss.isfinite() & (first == 0), step)

    def check(self) -> None:
        """Raise Failed if a loss was not finite at a step so far."""
        for name, step in self.first.items():
            if step > 0:
                remedy = "a new run with a smaller --learning-rate may help (--resume keeps the rate)"
                raise Failed(f"the {name} loss was not finite at step {step}; {remedy}")


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the average of a model's parameters after update step = 1, 2, ..., and copy its buffers.

    It begins with a smaller decay, so that it soon forgets the network that the first step found.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for buffer, current in zip(average.buffers(), model.buffers()):
        buffer.copy_(current)


# --- run folder and checkpoint -------------------------------------------------------------------


def make_folder(args, script: str, command: str, rank: int) -> Path:
    """Make runs/{dataset}__{script}__{seed}__{time}/ with args.json; with --resume, return to that run's.

    No other process may be in it. BadInput: one is, or the folder cannot be written; if that is so with
    --eval-only, return a temporary one.
    """
    dataset = re.sub("[:/]", "-", args.dataset)[-50:]  # a file's name has 255 bytes at most
    name = f"{dataset}__{script}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.resume or Path(args.runs_dir, name))
    if rank > 0:
        return folder  # of which only the first process knows the true name, and writes to it
    try:
        if args.resume is None:
            folder = make_new(folder)
        LOCKS.append(FileLock(folder / "lock", is_singleton=True))  # this process may come again
        LOCKS[-1].acquire(timeout=0)
        (folder / "samples").mkdir(exist_ok=True)
        if not args.eval_only:
            write_json(folder / "args.json", dataclasses.asdict(args))
    except Timeout as error:
        raise BadInput(f"--resume {folder}: another process is at work on this run") from error
    except OSError as error:
        if not args.eval_only:
            raise BadInput(f"run folder {folder} (--runs-dir) cannot be written: {error}") from error
        folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
        (folder / "samples").mkdir()
        print(f"warning: {args.resume} cannot be written ({error})")
    print(command, f"in {folder}", sep="\n", flush=True)
    return folder


def make_new(folder: Path) -> Path:
    """Make folder, or folder-1, folder-2, ... where other runs have begun in the same second; return it."""
    path, again = folder, 0
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            again += 1
            path = folder.with_name(f"{folder.name}-{again}")


def write_whole(path: Path, write) -> None:
    """Write a file by write(file), whole or not at all: a killed run or a full disk leaves the old one."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Write content as JSON, whole or not at all."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


class Silent:
    """A writer that writes nothing: every process but the first has one."""

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


def make_writer(folder: Path, args, step: int, rank: int):
    """Return a TensorBoard writer, which takes back what a killed run wrote after its last checkpoint."""
    if rank > 0:
        return Silent()
    from torch.utils.tensorboard import SummaryWriter

    if args.track:
        import wandb

        name, config = re.sub(r"[^\w.-]", "-", folder.name), dataclasses.asdict(args)
        wandb.init(project="mmd", name=name, id=name, config=config, resume="allow", sync_tensorboard=True)
    # TensorBoard reads files by the second in their names: a clock that was set back would mix the curves.
    older = sorted(folder.glob("events.out.tfevents.*"))
    if older and older[-1].name >= f"events.out.tfevents.{int(time.time()):010}":
        for i, file in enumerate(older):
            file.rename(folder / re.sub(r"\.tfevents\.\d+", f".tfevents.{i:010}", file.name))
    writer = SummaryWriter(folder, purge_step=step + 1)
    writer.add_text("arguments", table(dataclasses.asdict(args)), step)
    return writer


def write_scalars(writer, scalars: dict[str, object], step: int) -> None:
    """Write points of curves, given by tag."""
    with failures_noted():
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)


def table(content: dict) -> str:
    """Return content as TensorBoard's Markdown."""
    return "\n".join(["|name|value|", "|-|-|", *(f"|{name}|{value}|" for name, value in content.items())])


def save_results(folder: Path, writer, args, step: int, metrics: dict, protocol: dict, rank: int) -> None:
    """Print the metrics, and write them with their protocol to folder/results.json and to TensorBoard."""
    if rank > 0:
        return
    protocol = protocol | {"train_split": args.train_split}
    protocol |= {"batch_norm": args.sample_bn, "ema_decay": args.ema_decay}
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Failed(f"{name} was {value} at step {step}; {folder / 'results.json'} is as it was")
    write_scalars(writer, {f"eval/{name}": value for name, value in metrics.items()}, step)
    with failures_noted():
        writer.add_text("eval/protocol", table(protocol), step)
        write_json(folder / "results.json", {"step": step, "metrics": metrics, "protocol": protocol})
        tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


def save_checkpoint(folder: Path, args, script: str, step: int, models: dict, rank: int) -> None:
    """Write folder/checkpoint.pt whole or not at all; what is not finite never enters one (Failed)."""
    check_replicas(models, step)
    if rank > 0:
        return
    state = {name: model.state_dict() for name, model in models.items()}
    path = folder / "checkpoint.pt"
    if not all(t.isfinite().all() for t in tree_leaves(state) if isinstance(t, torch.Tensor)):
        raise Failed(f"weights were not finite at step {step}; {path} is the last good state")
    try:
        head = {"script": script, "args": dataclasses.asdict(args), "step": step}
        write_whole(path, lambda file: torch.save(head | state, file))
    except (OSError, RuntimeError) as error:
        left = "it is still the last good state" if path.exists() else "it is gone"
        raise Failed(f"{path} could not be written ({error}); {left}") from error


def load_checkpoint(args, script: str, models: dict, may_change: set[str] = MAY_CHANGE) -> int:
    """Put the checkpoint of --resume into models and return its step; without --resume return 0.

    Nothing in the file is executed. Another script's, or one of other arguments but for those that may
    change, is refused (BadInput).
    """
    if args.resume is None:
        return 0
    path = Path(args.resume, "checkpoint.pt")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() or any(entry.external_attr for entry in archive.infolist())
        if damaged:  # torch.load looks at no checksum, and leaves out what is marked as a folder
            raise ValueError("its checksums are not those of its content")
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, saved_script, step = state["args"], state["script"], state["step"]
        if not isinstance(step, int):
            raise TypeError(f"its step is {step}")
    except Exception as error:
        raise BadInput(f"--resume: {path} is missing, damaged or no checkpoint ({error!r:.90})") from error
    require(saved_script == script, "--resume", args.resume, f"a run of {script}.py, not {saved_script}.py")
    changed = []
    for key, value in dataclasses.asdict(args).items():
        was = saved.get(key)
        moved = key == "dataset" and value.startswith("folder:") and str(was).startswith("folder:")
        if value != was and key not in may_change and not moved:  # moved images are compared below
            changed.append(f"--{key.replace('_', '-')} {value} (was {was})")
    require(not changed, "--resume", args.resume, f"without a change of {', '.join(changed)}")
    require(args.eval_only or args.total_steps >= step, "--total-steps", args.total_steps, f"{step} or more")
    try:
        for name, model in models.items():
            model.load_state_dict(state[name])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        problem = f"does not fit the networks of {script}.py ({error!s:.90})"
        raise BadInput(f"--resume: {path} {problem}") from error
    check_replicas(models, step)
    return step
