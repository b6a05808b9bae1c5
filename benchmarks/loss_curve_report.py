"""Numbers, figure and page of the loss curves (`compare_loss_curves`)."""

import io
import itertools
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from equiformer2 import EquiformerV2
from equiformer2.checkpoint.checkpoint import read_contents

#: Relative difference of the losses before any update beyond which the comparison is none.
FIRST_TOLERANCE = 1e-5
#: Windows of the table; the running mean in the figure is over half a window.
WINDOWS = 10
#: Relative differences whose first step is told.
DEPARTURES = (1e-5, 1e-4, 1e-3, 1e-2)
OURS, PLAIN = "equiformer2", "equiformer2_plain"
#: What is compared, by its key in the results file.
PAIRS = {
    "ours": "equiformer2 and fairchem-core, all seeds",
    "seeds": "two seeds of fairchem-core, all pairs",
    "plain": "equiformer2 and itself with plain expressions",
}
_GREY, _BLUE, _RED, _PALE = "#9aa5b1", "#1f77b4", "#c0392b", "#ecbdb6"


def summarize(
    shared: dict[str, Any], curves: dict[str, dict[str, Any]], distances: dict[str, Any]
) -> dict[str, Any]:
    """Collect everything that the figure and the page show.

    Args:
        shared: content of `shared.json`.
        curves: by name, `equiformer2`, `equiformer2_plain` and `reference_SEED`; `steps` with `loss` and
            `grad_norm`, those of the reference with its `decaying` parameters, the first one with `graphs`.
        distances: of `parameter_distances`.
    """
    losses = {name: [step["loss"] for step in curve["steps"]] for name, curve in curves.items()}
    names = [name for name in curves if name.startswith("reference_")]
    references = np.array([losses[name] for name in names])
    ours, plain = np.array(losses[OURS]), np.array(losses[PLAIN])
    windows = []
    for steps in np.array_split(np.arange(len(ours)), min(WINDOWS, len(ours))):
        part = slice(int(steps[0]), int(steps[-1]) + 1)
        means = references[:, part].mean(axis=1)
        mean, low, high = float(ours[part].mean()), float(means.min()), float(means.max())
        windows.append(
            {
                "first": part.start,
                "last": part.stop - 1,
                "ours": mean,
                "reference": means.tolist(),
                "outside": max(low - mean, mean - high, 0.0) / float(means.mean()),
                "band": (high - low) / float(means.mean()),
            }
        )
    apart = {
        "ours": relative(ours[None], references).max(axis=0),
        "seeds": between_seeds(references),
        "plain": relative(ours, plain),
    }
    learning_rates = [
        abs(mine["next_lr"] - theirs["lr"]) / theirs["lr"]
        for mine, theirs in zip(curves[OURS]["steps"], curves[names[0]]["steps"][1:], strict=False)
    ]
    return {
        **shared["wish"],
        "seeds": len(names),
        "parameters": shared["parameters"],
        "atoms": shared["atoms"],
        "settings": {key: shared[key] for key in ("normalizers", "energy_coefficient", "force_coefficient")}
        | {"ema_decay": shared["ema_decay"], **shared["optim"]},
        "graphs": curves[names[0]]["graphs"],
        "first_difference": float(relative(ours[None], references)[:, 0].max()),
        "largest_lr_difference": max(learning_rates, default=0.0),
        "windows": windows,
        "largest_outside": max(window["outside"] for window in windows),
        "largest_band": max(window["band"] for window in windows),
        "final": {
            "ours": windows[-1]["ours"],
            "plain": float(plain[windows[-1]["first"] :].mean()),
            "reference_mean": statistics.fmean(windows[-1]["reference"]),
            "reference_deviation": statistics.stdev(windows[-1]["reference"]),
        },
        "departures": {
            name: [first_above(values, limit) for limit in DEPARTURES] for name, values in apart.items()
        },
        "largest_difference": {name: float(values.max()) for name, values in apart.items()},
        "clipped_steps": {
            name: sum(step["grad_norm"] > shared["optim"]["clip_grad_norm"] for step in curve["steps"])
            for name, curve in curves.items()
        },
        "distances": distances,
        "losses": losses,
    }


def relative(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Size of the difference as a share of `other`, element by element."""
    share: np.ndarray = np.abs(one - other) / np.abs(other)
    return share


def first_above(values: np.ndarray, limit: float) -> int | None:
    """Give the first step, counted from 0, at which `values` exceeds `limit`; None if it never does."""
    steps = np.flatnonzero(values > limit)
    return int(steps[0]) if len(steps) else None


def parameter_distances(initial: Path, curves: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compare the weights at the end, those that an output depends on.

    The reference's are read from the checkpoint file that its trainer wrote.

    Args:
        initial: checkpoint of the initial weights.
        curves: by name, each with the place of its `checkpoint` in the folder of `initial`.

    Returns:
        Per kind (`raw`, `averaged`): the way that each curve has `travelled`, as a share of the norm of the
        initial weights, and the smallest and largest distance of each of `PAIRS`, as a share of the way of
        the reference. `same_decay`: the same parameters have weight decay.
    """
    start = read_contents(initial)
    with torch.random.fork_rng(devices=[]):
        model = EquiformerV2(start.config)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    contents = {name: read_contents(initial.parent / curve["checkpoint"]) for name, curve in curves.items()}
    references = [name for name in curves if name.startswith("reference_")]
    decaying = set(trained) - model.no_weight_decay()
    result: dict[str, Any] = {
        "same_decay": all(set(curves[name]["decaying"]) & set(trained) == decaying for name in references)
    }

    def flat(weights: Any) -> torch.Tensor:
        return torch.cat([weights[name].double().flatten() for name in trained])

    origin = flat(start.weights["raw"])
    for kind in ("raw", "averaged"):
        ends = {name: flat(content.weights[kind]) for name, content in contents.items()}
        way = statistics.fmean(float((ends[name] - origin).norm()) for name in references)
        pairs = {
            "ours": [(OURS, name) for name in references],
            "seeds": list(itertools.combinations(references, 2)),
            "plain": [(OURS, PLAIN)],
        }
        between = {
            key: [float((ends[a] - ends[b]).norm()) / way for a, b in named] for key, named in pairs.items()
        }
        result[kind] = {
            "travelled": {name: float((end - origin).norm() / origin.norm()) for name, end in ends.items()},
            **{key: [min(values), max(values)] for key, values in between.items()},
        }
    return result


def smooth(values: Sequence[float], length: int) -> np.ndarray:
    """Running mean over `length` steps, fewer at both ends."""
    weights = np.ones(length)
    total: np.ndarray = np.convolve(values, weights, "same")
    return total / np.convolve(np.ones(len(values)), weights, "same")


def draw(record: dict[str, Any]) -> bytes:
    """Draw losses with the band of the reference's seeds above, and relative differences below; a PNG."""
    losses, seeds = record["losses"], record["seeds"]
    references = np.array([values for name, values in losses.items() if name.startswith("reference_")])
    ours, plain = np.array(losses[OURS]), np.array(losses[PLAIN])
    steps, length = np.arange(len(ours)), max(3, len(ours) // WINDOWS // 2)
    figure = Figure(figsize=(8.0, 7.0), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for number, values in enumerate(references):
        label = f"fairchem-core, each step of {seeds} seeds" if number == 0 else None
        above.plot(steps, values, color=_GREY, linewidth=2.0, alpha=0.4, label=label)
    above.plot(steps, ours, color=_BLUE, linewidth=0.5, label="equiformer2, each step")
    smoothed = np.array([smooth(values, length) for values in references])
    above.fill_between(
        steps,
        smoothed.min(axis=0),
        smoothed.max(axis=0),
        color=_PALE,
        linewidth=4.0,
        label=f"fairchem-core, band of {seeds} seeds, mean of {length} steps",
    )
    mean = smooth(losses[OURS], length)
    above.plot(steps, mean, color="black", linewidth=1.0, label=f"equiformer2, mean of {length} steps")
    above.set(ylabel="loss", yscale="log")
    for place in (above.yaxis.set_major_formatter, above.yaxis.set_minor_formatter):
        place("{x:.0f}")
    curves = (
        (
            "equiformer2 and fairchem-core, largest of the seeds",
            _BLUE,
            relative(ours[None], references).max(axis=0),
        ),
        ("two seeds of fairchem-core, largest of the pairs", _RED, between_seeds(references)),
        ("equiformer2 and itself with plain expressions", _GREY, relative(ours, plain)),
    )
    for label, color, values in curves:
        # Equal losses have no place on a logarithmic axis.
        below.plot(
            steps, np.where(values > 0, values, np.nan), color=color, lw=0.9, marker=".", ms=2, label=label
        )
    below.axhline(FIRST_TOLERANCE, color="black", linewidth=0.6, linestyle=":")
    below.set(ylabel="relative difference of the losses", yscale="log", xlabel="step")
    for axis in (above, below):
        axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()


def between_seeds(references: np.ndarray) -> np.ndarray:
    """Largest relative difference `[steps]` between two curves of `references` `[seeds, steps]`."""
    largest: np.ndarray = np.max([relative(a, b) for a, b in itertools.combinations(references, 2)], axis=0)
    return largest


def markdown(record: dict[str, Any], picture: str) -> str:
    """Write the page from the results file's content.

    Args:
        record: content of the results file.
        picture: file name of the figure.
    """
    return "\n\n".join(
        [
            "# Loss curves of both implementations",
            *_introduction(record, picture),
            "## Means over windows",
            _windows(record),
            "## First step with a larger difference",
            _wrapped(
                "Relative differences of the losses of single steps, counted from 0. Differences of rounding "
                "grow with every update, between two seeds of the reference as between the two "
                "implementations."
            ),
            _departures(record),
            "## Weights after the last step",
            _wrapped(
                "Euclidean distances, smallest to largest, as a share of the way that the reference has gone "
                "from the initial weights, over the parameters that an output depends on. The reference's "
                "weights are read from the checkpoint that its trainer wrote."
            ),
            *_weights(record),
            "## Made equal",
            _equal(record),
            _graphs(record["graphs"]),
            "## Not equal",
            "- Edge frames: random in the reference, a function of the edge here.\n"
            "- Rounding: edge vectors and normalised targets are float64 here before they become float32.\n"
            "- Parameters that no output depends on are frozen here; the reference lets them decay.\n",
        ]
    )


def _introduction(record: dict[str, Any], picture: str) -> list[str]:
    final, seeds, windows = record["final"], record["seeds"], record["windows"]
    inside = sum(window["outside"] == 0 for window in windows)
    return [
        f"Made by `{record['command']}` at commit {record['commit']}.",
        _wrapped(
            f"The network of `{record['config']}` with 600 Gaussians ({record['parameters']:,} parameters), "
            f"{record['steps']} steps of {record['batch_size']} structures from `{record['data']}` "
            f"({record['atoms']:,} atoms in all), float32, no dropout. `equiformer2 train` and the trainer "
            "of fairchem-core 1.10 (`equiformerv2_forces`: data set, normalizers, losses, AdamW with groups, "
            "schedule, clipping and moving average) get the same structures in the same order, the same "
            "edges and the same initial weights. The reference draws its edge frames at random; "
            f"{seeds} seeds of these are the band."
        ),
        f"![Losses and their differences]({picture})",
        _wrapped(
            f"- Before any update the losses differ by {record['first_difference']:.1g} of their value.", 2
        )
        + "\n"
        + _wrapped(
            f"- Mean from step {windows[-1]['first']} on: equiformer2 {final['ours']:.3f}, with plain "
            f"expressions {final['plain']:.3f}, fairchem-core {final['reference_mean']:.3f} ± "
            f"{final['reference_deviation']:.3f} (standard deviation of the seeds).",
            2,
        )
        + "\n"
        + _wrapped(
            f"- In {inside} of {len(windows)} windows our mean lies inside the band; at "
            f"most it lies {100 * record['largest_outside']:.2g} % outside, and the band is up to "
            f"{100 * record['largest_band']:.2g} % wide.",
            2,
        ),
    ]


def _windows(record: dict[str, Any]) -> str:
    rows = [
        (
            f"{window['first']} to {window['last']}",
            f"{window['ours']:.3f}",
            f"{min(window['reference']):.3f} to {max(window['reference']):.3f}",
            f"{100 * window['band']:.2g} %",
            f"{100 * window['outside']:.2g} %",
        )
        for window in record["windows"]
    ]
    header = ("steps", "equiformer2", "fairchem-core, band", "width of the band", "equiformer2 outside it by")
    return _table(header, rows)


def _departures(record: dict[str, Any]) -> str:
    rows = []
    for key, text in PAIRS.items():
        first = record["departures"][key]
        largest = f"{record['largest_difference'][key]:.2g}"
        rows.append((text, *("never" if step is None else str(step) for step in first), largest))
    return _table(
        ("between", *(f"above {limit:.0e}".replace("e-0", "e-") for limit in DEPARTURES), "largest"), rows
    )


def _weights(record: dict[str, Any]) -> list[str]:
    distances = record["distances"]

    def extent(values: list[float]) -> str:
        return f"{100 * values[0]:.2g} to {100 * values[1]:.2g} %"

    between = [
        (text, extent(distances["raw"][key]), extent(distances["averaged"][key]))
        for key, text in PAIRS.items()
    ]
    ways = [
        (
            name,
            *(f"{100 * distances[kind]['travelled'][name]:.3f} %" for kind in ("raw", "averaged")),
            str(record["clipped_steps"][name]),
        )
        for name in record["losses"]
    ]
    header = ("curve", "way of the weights, of their norm", "way of the average", "clipped steps")
    return [_table(("between", "weights", "averaged weights"), between), _table(header, ways)]


def _equal(record: dict[str, Any]) -> str:
    settings = record["settings"]
    energy, forces = settings["normalizers"]["energy"], settings["normalizers"]["forces"]
    coefficients = settings["energy_coefficient"], settings["force_coefficient"]
    return _table(
        ("setting", "value"),
        [
            ("loss", f"{coefficients[0]:g} · `mae` of energies + {coefficients[1]:g} · `l2mae` of forces"),
            ("forces", "mean of the norm of the error over the free atoms of a batch"),
            ("normalizers", f"energy {energy[0]:.4f} ± {energy[1]:.4f} eV, forces ± {forces[1]:.4f} eV/Å"),
            (
                "AdamW",
                f"decay {settings['weight_decay']:g}, betas "
                + ", ".join(f"{b:g}" for b in settings["betas"]),
            ),
            (
                "parameters that decay",
                "the same" if record["distances"]["same_decay"] else "**not the same**",
            ),
            (
                "learning rate",
                f"{settings['lr']:g}, from {settings['warmup_factor']:g} of it over the first "
                f"{settings['warmup_epochs']:g} of the steps, cosine over all of them to "
                f"{settings['lr_min_factor']:g}; largest relative difference "
                f"{record['largest_lr_difference']:.1g}",
            ),
            ("clipping", f"norm of all gradients {settings['clip_grad_norm']:g}"),
            ("average", f"decay {settings['ema_decay']:g}, no warm-up: the reference has none"),
            ("distances", "600 Gaussians, which the reference takes whatever its configuration says"),
            ("edges", "this package's, stored with the structures as in OC20's files"),
            ("positions, targets", "float32, as in OC20's files"),
        ],
    )


def _graphs(graphs: dict[str, Any]) -> str:
    return _wrapped(
        f"Left to itself the reference would choose {graphs['edges_differ']:,} of {graphs['edges']:,} edges "
        f"otherwise, in {graphs['structures_differ']:,} of {graphs['structures']:,} structures: ties, where "
        f"an edge and the one in its place differ by at most {graphs['widest_tie']:.1g} Å in length. The "
        "reference takes the one that rounding puts first, this package that of a fixed direction "
        "([graph](../graph.md))."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _wrapped(text: str, indent: int = 0) -> str:
    return textwrap.fill(
        text, 120, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
