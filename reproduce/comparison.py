"""Which method should I use? The six methods and four baselines, side by side.

    python -m reproduce.comparison --data-dir data
    python -m reproduce.comparison --data-dir data --only digits

8gaussians, 25gaussians, digits: a controlled comparison of losses. Networks, width, batch, latent and
optimiser are one for all methods (Generator, Critic, CONTROLLED and BETAS below). What is left to a method is
what its paper is about, as its script has it for the data set: kernel and bandwidths, number of the critic's
outputs, regulariser, normalisation or clipping, critic updates per generator update. Three seeds; two tables,
one after equally many updates of the generator, one after equal CPU time.

Results: docs/comparison.json, one entry for each run, written when it ends; docs/comparison.md, the tables;
docs/comparison_NAME.png, samples. A killed command goes on where it was when it is given again.
"""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import tyro
from matplotlib import pyplot
from PIL import Image
from torch import Tensor, nn

import gamn
import gmmn
import gram_net
import mmd_gan
import mmd_gan_repulsive
import smmd_gan
from baselines import gan, wgan
from common import datasets, evaluation, run
from reproduce import page, training

NAME = Path(__file__).stem


@dataclass
class Method:
    script: ModuleType
    own: dict  # the arguments that make it this method
    networks: Callable  # of (args, shape): the players of the controlled comparison, as the script wants them


# --- the controlled comparison: one pair of networks for all ---------------------------------------

CONTROLLED = {  # what is one for all methods
    "8gaussians": dict(batch_size=128, width=128, latent_dim=2, learning_rate=5e-4),
    "25gaussians": dict(batch_size=128, width=128, latent_dim=2, learning_rate=5e-4),
    "digits": dict(batch_size=64, width=16, latent_dim=16, learning_rate=5e-4),
}
BETAS = (0.5, 0.999)  # Adam's, of both players
UPDATES = {"8gaussians": 2000, "25gaussians": 2000, "digits": 1000}  # of the generator: the first table
SECONDS = {"8gaussians": 40, "25gaussians": 40, "digits": 60}  # of one core: the second table
SEEDS = (1, 2, 3)


class Generator(nn.Module):
    """z (B, latent_dim) -> samples (B, *shape), images in value_range."""

    def __init__(
        self, shape: tuple[int, ...], latent_dim: int, width: int, value_range: tuple[float, float]
    ) -> None:
        super().__init__()
        self.low, self.high = value_range
        self.image = len(shape) == 3
        if self.image:  # 8x8 from 4x4
            self.layers = nn.Sequential(
                nn.Linear(latent_dim, 4 * width * 16),
                nn.Unflatten(1, (4 * width, 4, 4)),
                nn.BatchNorm2d(4 * width),
                nn.ReLU(),
                nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1),
                nn.BatchNorm2d(2 * width),
                nn.ReLU(),
                nn.Conv2d(2 * width, shape[0], 3, 1, 1),
                nn.Sigmoid(),
            )
        else:
            self.layers = nn.Sequential(
                nn.Linear(latent_dim, width),
                nn.ReLU(),
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Linear(width, *shape),
            )

    def forward(self, z: Tensor) -> Tensor:
        x = self.layers(z)
        return self.low + (self.high - self.low) * x if self.image else x


class Critic(nn.Module):
    """Samples (B, *shape) -> outputs (B, outputs), without batch norm.

    weighted: the layers that have weights, with the shape (*in_shape) that each sees.
    """

    def __init__(self, shape: tuple[int, ...], outputs: int, width: int) -> None:
        super().__init__()
        if len(shape) == 3:
            c = width
            hidden = [
                nn.Conv2d(shape[0], c, 3, 1, 1),
                nn.Conv2d(c, 2 * c, 4, 2, 1),
                nn.Conv2d(2 * c, 4 * c, 3, 1, 1),
            ]
            last = nn.Linear(4 * c * 16, outputs)
        else:
            hidden = [nn.Linear(*shape, width), nn.Linear(width, width), nn.Linear(width, width)]
            last = nn.Linear(width, outputs)
        stages = [nn.Sequential(layer, nn.LeakyReLU(0.2)) for layer in hidden]
        self.layers = nn.Sequential(*stages, nn.Sequential(nn.Flatten(), last))
        self.weighted = [*hidden, last]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class CriticWithOutputs(Critic):
    """What smmd_gan.py asks for: the outputs of all layers, the last the features."""

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs


def players(args, shape: tuple[int, ...], script: ModuleType, outputs: int) -> tuple[Generator, Critic]:
    """Return the networks that are one for all methods."""
    generator = Generator(shape, args.latent_dim, args.width, script.VALUE_RANGE)
    return generator, Critic(shape, outputs, args.width)


def for_features(script: ModuleType) -> Callable:
    """Return the maker of networks for a method whose critic has --feature-dim outputs and nothing else."""
    return lambda args, shape: players(args, shape, script, args.feature_dim)


def for_mmd_gan(args, shape: tuple[int, ...]) -> tuple[Generator, Critic]:
    """Return the players, the critic with a decoder that has the generator's layers."""
    generator, critic = players(args, shape, mmd_gan, args.feature_dim)
    critic.decoder = Generator(shape, args.feature_dim, args.width, mmd_gan.VALUE_RANGE)
    return generator, critic


def for_repulsive(args, shape: tuple[int, ...]) -> tuple[Generator, Critic]:
    """Return the players, the critic's weights normalised as the method does."""
    generator, critic = players(args, shape, mmd_gan_repulsive, args.feature_dim)
    x = torch.zeros(1, *shape)
    seen = []  # the shape that each layer sees
    for stage in critic.layers[:-1]:
        seen.append(x.shape[1:])
        x = stage(x).detach()
    seen.append(x.flatten(1).shape[1:])
    for layer, in_shape in zip(critic.weighted, seen):
        mmd_gan_repulsive.normalise(layer, in_shape, args.sn_gain, args.critic_norm)
    return generator, critic


def for_smmd(args, shape: tuple[int, ...]) -> tuple[Generator, Critic]:
    """Return the players, the critic with all layers' outputs, its weights normalised as the method does."""
    generator = Generator(shape, args.latent_dim, args.width, smmd_gan.VALUE_RANGE)
    critic = CriticWithOutputs(shape, args.feature_dim, args.width)
    smmd_gan.normalise(critic, args.critic_norm, args.sn_scale)
    return generator, critic


def for_gan(args, shape: tuple[int, ...]) -> tuple[Generator, Critic]:
    """Return the players, the critic's weights normalised for SN-GAN."""
    generator, critic = players(args, shape, gan, 1)
    if args.critic_norm == "pim":
        for layer in critic.weighted:
            nn.utils.parametrizations.spectral_norm(layer)
    return generator, critic


METHODS = {
    "GMMN": Method(gmmn, dict(optimizer="adam", momentum=BETAS[0], drop_step=10**9), for_features(gmmn)),
    "GAMN": Method(gamn, {}, for_features(gamn)),
    "MMD-GAN": Method(mmd_gan, {}, for_mmd_gan),
    "repulsive": Method(mmd_gan_repulsive, dict(kernel="rbf-b"), for_repulsive),
    "SMMD-GAN": Method(smmd_gan, {}, for_smmd),
    "GRAM-net": Method(gram_net, {}, for_features(gram_net)),
    "GAN": Method(gan, {}, for_gan),
    "SN-GAN": Method(gan, dict(loss="hinge", critic_norm="pim"), for_gan),
    "WGAN": Method(wgan, dict(constraint="clip"), lambda args, shape: players(args, shape, wgan, 1)),
    "WGAN-GP": Method(wgan, {}, lambda args, shape: players(args, shape, wgan, 1)),
}


@contextlib.contextmanager
def one_for_all(method: Method) -> Iterator[None]:
    """Within this block the script has the networks, the noise and the optimiser that are one for all."""
    script = method.script

    def make_networks(args, shape: tuple[int, ...], device: torch.device) -> tuple[nn.Module, nn.Module]:
        generator, critic = method.networks(args, shape)
        return generator.to(device), critic.to(device)

    def only_generator(shape: tuple[int, ...], latent_dim: int, width: int, toy: bool) -> nn.Module:
        return Generator(shape, latent_dim, width, script.VALUE_RANGE)

    def draw_noise(n: int, args, device: torch.device) -> Tensor:
        return torch.randn(n, args.latent_dim, device=device)

    def adam(parameters: Iterator[nn.Parameter], rate: float) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, rate, BETAS)

    with contextlib.ExitStack() as stack:
        if script is gmmn:  # which has no critic
            stack.enter_context(mock.patch.object(script, "Generator", only_generator))
        else:
            stack.enter_context(mock.patch.object(script, "make_networks", make_networks))
        stack.enter_context(mock.patch.object(script, "draw_noise", draw_noise))
        stack.enter_context(mock.patch.object(torch.optim, "RMSprop", adam))
        yield


# --- running ---------------------------------------------------------------------------------------


def arguments(method: Method, data_set: str, seed: int, data_dir: str):
    """Return the arguments of a run of the controlled comparison."""
    given = dict(
        method.own, dataset=data_set, data_dir=data_dir, seed=seed, device="cpu", **CONTROLLED[data_set]
    )
    own = vars(method.script.Args())
    if "critic_learning_rate" in own:
        given["critic_learning_rate"] = given["learning_rate"]
    if "beta1" in own:
        given["beta1"], given["beta2"] = BETAS
    every = dict(eval_every=10**9, sample_every=0, log_every=500, save_every=200)  # the last step does all
    return method.script.Args(**given, **every, eval_features="pixels")


def measure(
    data_set: str, methods: list[str], args: training.Args, updates: int, rounds: int
) -> dict[str, float]:
    """Return the CPU seconds of each method's unit of work: the median of rounds in which all take turns."""
    found = {name: [] for name in methods}
    for _ in range(rounds):
        for name in methods:
            method = METHODS[name]
            settings = arguments(method, data_set, 1, args.data_dir)
            with one_for_all(method):
                times = training.update_times(method.script, settings, updates)
            found[name].append(training.seconds_of_work(method.script, settings, times))
    return {name: statistics.median(values) for name, values in found.items()}


def train(method: Method, settings, steps: int, folder: Path) -> dict:
    """Train to a number of updates, and return its metrics, or that it diverged."""
    try:
        with one_for_all(method):
            made = training.train_to(method.script, replace(settings, total_steps=steps), folder)
    except run.Failed as error:
        print(error)
        return {"steps": steps, "diverged": True}
    results = training.read_results(made / "results.json")
    return {"steps": steps, "diverged": False, "metrics": results["metrics"], "protocol": results["protocol"]}


def run_all(data_set: str, methods: list[str], seed: int, args: training.Args, results: dict) -> None:
    """Train what results does not have of a data set and a seed yet; each run is written when it ends."""
    path = Path(args.folder, f"{NAME}.json")
    updates, rounds = (2, 1) if args.quick else (25, 3)
    found = results.setdefault(data_set, {"seconds": {}, "runs": {}})
    if not found["seconds"]:
        found["seconds"] = measure(data_set, methods, args, updates + 5, rounds)
        training.write_results(path, results)
    for name in methods:
        method = METHODS[name]
        made = found["runs"].setdefault(f"{name}, seed {seed}", {})
        settings = arguments(method, data_set, seed, args.data_dir)
        second = found["seconds"][name]
        steps = {"updates": UPDATES[data_set]}
        steps["time"] = training.updates_within(SECONDS[data_set], second, method.script, settings)
        if args.quick:
            steps = {"updates": 2, "time": 3}
        folder = Path(args.runs_dir, NAME, data_set, f"{name}-{seed}")
        for table in sorted(steps, key=steps.get):  # the longer one goes on from the shorter one
            if table not in made:
                made[table] = train(method, settings, steps[table], folder)
                training.write_results(path, results)


# --- what is shown ---------------------------------------------------------------------------------

COLUMNS = {  # of the tables: name of a metric: heading
    "toys": {"modes": "modes", "high_quality": "share of high quality", "mmd": "MMD^2"},
    "images": {
        "pixel_frechet": "Frechet distance of pixels",
        "pixel_kid": "KID of pixels",
        "pixel_mmd": "MMD^2",
    },
}
TITLES = {"updates": "equally many updates of the generator", "time": "equal CPU time"}


def columns(data_set: str) -> dict[str, str]:
    """Return the columns of a data set's tables."""
    return COLUMNS["toys" if data_set in datasets.TOYS else "images"]


def spread(values: list[float]) -> str:
    """Return the median of values, and their range if they differ."""
    text = f"{statistics.median(values):.3g}"
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return text if low == high else f"{text} ({low} to {high})"


def real_images(data_set: str, runs: dict) -> dict[str, float]:
    """Return what real samples have in the place of generated ones: what a perfect model would get."""
    if data_set in datasets.TOYS:
        real = datasets.draw_toy(data_set, evaluation.TOY_SAMPLES, seed=12345)
        return evaluation.toy_metrics(data_set, real)
    protocols = [made["updates"].get("protocol") for made in runs.values() if "updates" in made]
    protocol = next(found for found in protocols if found)
    return {
        name.removeprefix("floor "): value
        for name, value in protocol.items()
        if name.startswith("floor pixel")
    }


def table(data_set: str, which: str, found: dict) -> list[str]:
    """Return a Markdown table of a data set, its rows in the order of METHODS."""
    shown = columns(data_set)
    lines = [f"| | {' | '.join(shown.values())} | updates | updates per second | diverged |"]
    lines.append("|---" * (len(shown) + 4) + "|")
    for name in METHODS:
        seeds = [runs for key, runs in found["runs"].items() if key.startswith(f"{name}, ")]
        made = [runs[which] for runs in seeds if which in runs]
        if not made:
            continue
        good = [run["metrics"] for run in made if not run["diverged"]]
        cells = []
        for metric in shown:
            values = [metrics[metric] for metrics in good]
            cells.append(spread(values) if values else "-")
        rate = found["runs"][f"{name}, seed 1"]["time"]["steps"] / SECONDS[data_set]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {made[0]['steps']:,} | {rate:.3g} | {len(made) - len(good)} |"
        )
    floors = real_images(data_set, found["runs"])
    cells = [f"{floors[metric]:.3g}" if metric in floors else "-" for metric in shown]
    lines.append(f"| *real samples* | {' | '.join(cells)} | | | |")
    return lines


def draw(data_set: str, methods: list[str], found: dict, args: training.Args) -> None:
    """Write a picture of samples of each method after equal CPU time, seed 1, if its run folders are here."""
    pictures = {}
    for name in methods:
        step = found["runs"][f"{name}, seed 1"]["time"]["steps"]
        drawn = list(Path(args.runs_dir, NAME, data_set, f"{name}-1").glob(f"*/samples/{step:07d}.png"))
        if not drawn:
            return
        pictures[name] = Image.open(drawn[0])
    if data_set in datasets.TOYS:
        figure, axes = pyplot.subplots(2, math.ceil(len(methods) / 2), figsize=(14, 6), squeeze=False)
    else:
        figure, axes = pyplot.subplots(len(methods), 1, figsize=(10, len(methods)), squeeze=False)
    for place in axes.flat:
        place.axis("off")
    for place, (name, picture) in zip(axes.flat, pictures.items()):
        if data_set in datasets.TOYS:
            picture = picture.crop((0, 0, picture.height, picture.height))  # without the projected space
        else:
            picture = picture.crop((0, 0, picture.width, picture.height // 8))  # the first of 8 rows
        place.imshow(picture)
        place.set_title(name, fontsize=9)
    caption = f"{data_set}: samples after {SECONDS[data_set]} CPU seconds, seed 1."
    page.save(figure, caption, f"{NAME}_{data_set}", args)


@dataclass
class Args(training.Args):
    only: tuple[str, ...] = tuple(CONTROLLED)  # data sets


def main(args: Args) -> dict:
    """Train what is missing, write tables and pictures; return the results."""
    methods, seeds, only = list(METHODS), SEEDS, args.only
    if args.quick:
        methods, seeds, only = ["GMMN"], (1,), ("8gaussians",)
    for data_set in only:
        run.require(data_set in CONTROLLED, "--only", data_set, f"one or more of {', '.join(CONTROLLED)}")
    results = training.read_results(Path(args.folder, f"{NAME}.json"))
    for seed in seeds:
        for data_set in only:
            run_all(data_set, methods, seed, args, results)
            draw(data_set, methods, results[data_set], args)
    lines = []
    for data_set, found in results.items():
        for which, title in TITLES.items():
            lines += [f"### {data_set}: {title}", "", *table(data_set, which, found), ""]
    text = "\n".join(lines)
    Path(args.folder, f"{NAME}.md").write_text(text)
    print(text)
    return results


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (run.BadInput, run.Failed) as error:
        run.give_up(error)
