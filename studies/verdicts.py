"""Claims that a pruning study tests, each with the verdict of its results."""

import itertools
import re
from dataclasses import dataclass
from typing import Any

from equiformer2.pruning.analysis.pareto import DENSE, SCRATCH
from studies.campaign import Campaign
from studies.timed_study import TIMED

_WORSE = 1.05
_FASTER = 1.6
_ROUTER_BASELINES = ("route_random", "route_uniform", "route_distance")
_CUT_BASELINES = ("block", "block_filled", "cosine_filled", "magnitude", "random", "uniform")
_TIMED_WAYS = re.compile(rf"(.*_(?:multi|{TIMED}|random_weights_(?:uniform|blocks)))(?:_seed\d+)?")
_AGAINST = {"to_dense": "the dense network", "to_labels": "labels"}

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """One thing that was to be shown: the question, what was measured and whether it holds."""

    question: str
    measured: str
    holds: bool


def verdicts(
    campaign: Campaign, tables: dict[str, Rows], lossless: dict[str, Any], speed: dict[str, Any]
) -> list[Verdict]:
    """Return the verdicts on everything that was computed.

    Args:
        campaign: what was asked.
        tables: study -> its rows, as `summarise` gives them.
        lossless, speed: name -> record of `studies.force_call_times`.
    """
    studied = (routers_verdicts, cuts_verdicts, distilled_verdicts)
    return [
        *lossless_verdicts(lossless),
        *[v for judge in studied for name, rows in tables.items() for v in judge(campaign, name, rows)],
        *speed_verdicts(campaign, speed),
    ]


def row_of(rows: Rows, method: str, keep: float, trained: str) -> dict[str, Any] | None:
    """The row of a method at a budget, `cut` or `distilled`; None where it was not computed."""
    for row in rows:
        if (row["method"], row["keep"], row["trained"]) == (method, keep, trained):
            return row
    return None


def mae_of(row: dict[str, Any], held_out: str, reference: str) -> float:
    """Force MAE of a row, eV/Å, mean over seeds."""
    return float(row["errors"][held_out][reference]["force_mae"]["mean"])


def lossless_verdicts(lossless: dict[str, Any]) -> list[Verdict]:
    verdicts = []
    for name, record in lossless.items():
        last = record["savings"][-1]
        ratio, deviation = last["latency"]["ratio"], last["force_deviation"]
        verdicts.append(
            Verdict(
                f"{name}: lossless tier, identical forces and time saved",
                f"time {ratio:.2f} of the whole, largest force difference {deviation:.1e} eV/Å",
                ratio < 1 and deviation < 1e-5,
            )
        )
    return verdicts


def routers_verdicts(campaign: Campaign, name: str, rows: Rows) -> list[Verdict]:
    """Judge FTP's trained router, and the static one at a searched schedule, which is its first stage."""
    dense = row_of(rows, DENSE, 1.0, "cut")
    verdicts = []
    for keep, method, held_out in itertools.product(
        campaign.studies[name].keep, ("route_ftp", "route_static"), campaign.held_out
    ):
        row = row_of(rows, method, keep, "cut")
        if dense is None or row is None:
            continue
        title = f"{name}, {held_out}, {method}"
        ratio = mae_of(row, held_out, "to_labels") / mae_of(dense, held_out, "to_labels")
        verdicts.append(
            Verdict(
                f"{title}: {keep:.0%} of the MACs, force MAE at most 5 % worse",
                f"{ratio - 1:+.1%} (MACs {row['macs_on'][held_out]:.1%})",
                ratio <= _WORSE,
            )
        )
        others = [row_of(rows, baseline, keep, "cut") for baseline in _ROUTER_BASELINES]
        if any(other is None for other in others):
            continue  # the page lists what has not been computed
        question = f"{title}: nearer to the dense network than random, uniform and distance"
        verdicts.append(_nearest(question, row, [o for o in others if o is not None], held_out, "to_dense"))
    return verdicts


def cuts_verdicts(campaign: Campaign, name: str, rows: Rows) -> list[Verdict]:
    """Compare the searched plans with the baselines of the study, as cut."""
    verdicts = []
    baselines = [method for method in _CUT_BASELINES if method in campaign.studies[name].methods]
    for keep, held_out, (reference, words) in itertools.product(
        campaign.studies[name].keep, campaign.held_out, _AGAINST.items()
    ):
        row = row_of(rows, "multi", keep, "cut")
        others = [row_of(rows, baseline, keep, "cut") for baseline in baselines]
        if row is None or not others or any(other is None for other in others):
            continue
        names = f"{', '.join(baselines[:-1])} and {baselines[-1]}"
        question = f"{name}, {held_out}, multi as cut to {keep:.0%}: nearer to {words} than {names}"
        verdicts.append(_nearest(question, row, [o for o in others if o is not None], held_out, reference))
    return verdicts


def _nearest(question: str, row: dict[str, Any], others: Rows, held_out: str, reference: str) -> Verdict:
    """Judge whether the mean of `row` is below all others, with MACs and deviations over seeds."""
    told = [
        f"{one['method'].removeprefix('route_')} {mae_of(one, held_out, reference):.4f} ± "
        f"{one['errors'][held_out][reference]['force_mae']['std']:.4f} ({one['macs_on'][held_out]:.1%})"
        for one in (row, *others)
    ]
    best = min(mae_of(other, held_out, reference) for other in others)
    measured = f"eV/Å (MACs): {told[0]} against {', '.join(told[1:])}"
    return Verdict(question, measured, mae_of(row, held_out, reference) < best)


def distilled_verdicts(campaign: Campaign, name: str, rows: Rows) -> list[Verdict]:
    dense = row_of(rows, DENSE, 1.0, "cut")
    verdicts = []
    for keep, method in itertools.product(campaign.studies[name].keep, ("multi", TIMED)):
        pruned = row_of(rows, method, keep, "distilled")
        # The plans that are trained from scratch are those of `multi`.
        scratch = row_of(rows, SCRATCH, keep, "distilled") if method == "multi" else None
        if dense is None or pruned is None:
            continue
        for held_out in campaign.held_out:
            own = mae_of(pruned, held_out, "to_labels")
            ratio = own / mae_of(dense, held_out, "to_labels")
            verdicts.append(
                Verdict(
                    f"{name}, {held_out}, {method}: {keep:.0%} of the MACs, distilled, "
                    "force MAE at most 5 % worse",
                    f"{ratio - 1:+.1%} (MACs {pruned['macs']:.1%})",
                    ratio <= _WORSE,
                )
            )
            if scratch is not None:
                other = mae_of(scratch, held_out, "to_labels")
                verdicts.append(
                    Verdict(
                        f"{name}, {held_out}: better than the same size from scratch, equally long",
                        f"{own:.4f} against {other:.4f} eV/Å",
                        own < other,
                    )
                )
    return verdicts


def speed_verdicts(campaign: Campaign, speed: dict[str, Any]) -> list[Verdict]:
    """Judge the mean over the plans of all seeds."""
    ways: dict[str, list[dict[str, Any]]] = {}
    for name, record in speed.items():
        if found := _TIMED_WAYS.fullmatch(name):
            ways.setdefault(found[1], []).append(record)
    verdicts = []
    for name, records in ways.items():
        faster = [1 / record["latency"]["ratio"] for record in records]
        mean = sum(faster) / len(faster)
        told = ", ".join(f"{value:.2f}" for value in faster)
        left = ", ".join(f"{record['macs']:.1%}" for record in records)
        verdicts.append(
            Verdict(
                f"{name}: force call through the calculator at {campaign.speed.keep:.0%} of the MACs, "
                f"{_FASTER} times as fast",
                f"{mean:.2f} times" + (f" ({told})" if len(faster) > 1 else "") + f", MACs {left}",
                mean >= _FASTER,
            )
        )
    return verdicts
