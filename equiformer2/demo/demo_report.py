"""The demo's report: one HTML file with everything in it."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from equiformer2.demo.plan import TEACHER_SYSTEMS, DemoPlan
from equiformer2.demo.steps import Network, Relaxed
from equiformer2.report import bullets, page, picture, table

#: Energies are called alike within this, eV: the accuracy that adsorption energies are used at.
_ALIKE = 0.1


@dataclass(frozen=True)
class DemoReport:
    """Results of the demo and the page that shows them.

    Attributes:
        plan: sizes of the demo.
        networks: as shipped, from nothing, fine-tuned, pruned without and with distillation, in this order.
        relaxed: relaxations.
        shown: the one that is shown in full.
        figures: caption to PNG file.
        seconds: wall time of each step.
    """

    plan: DemoPlan
    networks: Sequence[Network]
    relaxed: Sequence[Relaxed]
    shown: Relaxed
    figures: dict[str, Path]
    seconds: dict[str, float]

    def to_html(self) -> str:
        """Write one HTML page with everything in it, figures included; missing figures are left out."""
        result, tuned = self.shown.result, self.networks[2].result
        parts = [
            "<p>An EquiformerV2 that imitates a universal potential (SevenNet-0, <b>not DFT</b>) was "
            "fine-tuned on this machine on frames of OC20's DFT relaxations (VASP, RPBE; Chanussot et al. "
            "2021, CC-BY-4.0), compared with the same network trained from random weights, used for "
            "relaxations, and pruned.</p>",
            f"<h2>Errors on {tuned.systems} DFT systems that no training has seen</h2>",
            f"<p>{tuned.structures} frames, against DFT. Energies in eV, forces on free atoms in eV/Å.</p>",
            self._error_table(),
            bullets(self._verdicts()),
            "<h2>Adsorption energies of relaxed structures</h2>",
            f"<p>{html.escape(result.adsorbate_formula)} on {html.escape(self.shown.system)}, which no "
            f"training has seen, relaxed with the fine-tuned network: <b>{result.energy:.2f} eV</b> "
            f"({html.escape(result.system.outcome())}). DFT, relaxed by DFT: "
            f"<b>{self.shown.dft:.2f} eV</b>. The network as shipped is compared with SevenNet-0, whose "
            "labels "
            "it has learned, on slabs of bulks that it has not seen.</p>",
            self._relaxation_table(),
            bullets(self._relaxation_verdicts()),
            "<h2>Before and after pruning</h2>",
            self._pruning_table(),
            bullets(self._pruning_verdicts()),
            "<h2>Weak points</h2>",
            f"<div class='note'>{bullets(self._weak_points())}</div>",
            *(picture(name, path.read_bytes()) for name, path in self.figures.items() if path.exists()),
            "<h2>Time</h2><p>"
            + ", ".join(f"{html.escape(name)} {value:.0f} s" for name, value in self.seconds.items())
            + f"; together {sum(self.seconds.values()) / 60:.1f} minutes.</p>",
        ]
        return page("equiformer2 demo", parts)

    @property
    def _baselines(self) -> tuple[float, float]:
        """Energy MAE of the mean of the training frames (eV), and force MAE of zero forces (eV/Å)."""
        known = self.networks[2].result.baselines
        return known["mean_energy"]["energy_mae"], known["zero_force"]["forces_mae"]

    def _error_table(self) -> str:
        mean, zero = self._baselines
        rows = [
            [
                "trivial: mean of the training energies, zero forces",
                "",
                f"{mean:.3f}",
                f"{zero:.4f}",
                "0",
                "–",
            ]
        ]
        for network in self.networks:
            rows.append([*_title_and_steps(network), *_errors(network)])
            if network is self.networks[0]:
                rows[-1][2] += " (other labels)"
        head = ["network", "steps", "energy MAE", "force MAE", "force cosine", "EFwT"]
        return table(head, rows, bold=3)

    def _verdicts(self) -> list[str]:
        """Sentences that follow from the errors."""
        mean, zero = self._baselines
        _, scratch, tuned, _, _ = (network.result.metrics for network in self.networks)
        sentences = []
        for name, metrics in (("Fine-tuned", tuned), ("Trained from nothing", scratch)):
            sentences.append(
                f"{name}, the force error is {metrics['forces_mae'] / zero:.2f} times that of zero forces, "
                f"the energy error {metrics['energy_mae'] / mean:.2f} times that of the mean."
            )
        missing = self.networks[1].unseen_elements
        if missing:
            sentences.append(
                f"The unseen systems hold {', '.join(missing)}, of which the DFT frames for training have "
                "none: "
                "the fine-tuned network knows these elements from its first training only."
            )
        better = [
            name
            for name, key in (("energies", "energy_mae"), ("forces", "forces_mae"))
            if tuned[key] < scratch[key]
        ]
        sentences.append(
            f"In the same time, fine-tuning is better than training from nothing at {' and '.join(better)}."
            if better
            else "In the same time, fine-tuning is no better than training from nothing."
        )
        return sentences

    def _relaxation_table(self) -> str:
        rows = []
        for item in self.relaxed:
            run = item.result.system
            words = TEACHER_SYSTEMS.get(item.system, item.result.adsorbate_formula)
            rows.append(
                [
                    f"{item.system}: {words}",
                    item.network,
                    f"{item.result.energy:.2f}",
                    "–" if item.dft is None else f"{item.dft:.2f}",
                    "–" if item.teacher is None else f"{item.teacher:.2f}",
                    f"{item.start:.2f}",
                    f"{run.steps}",
                    "yes" if run.converged else "no",
                    ", ".join(anomaly.name for anomaly in item.result.anomalies) or "none",
                ]
            )
        head = ["system", "network", "network, relaxed (eV)", "DFT, relaxed (eV)", "SevenNet-0, relaxed (eV)"]
        return table([*head, "start (eV)", "steps", "converged", "anomalies"], rows)

    def _relaxation_verdicts(self) -> list[str]:
        sentences = []
        for name in dict.fromkeys(item.network for item in self.relaxed):
            mine = [item for item in self.relaxed if item.network == name]
            whose = {"dft": "DFT's", "teacher": "SevenNet-0's"}[mine[0].imitates]
            errors = [abs(item.result.energy - item.known) for item in mine if item.known is not None]
            converged = sum(item.result.system.converged for item in mine)
            sentences.append(
                f"Network {name}: {converged} of {len(mine)} relaxations converged (largest force below "
                f"{mine[0].result.system.fmax:g} eV/Å)."
            )
            if errors:
                close = sum(error <= _ALIKE for error in errors)
                sentences[-1] += (
                    f" {close} of {len(errors)} energies are within {_ALIKE:g} eV of {whose}, with a mean "
                    f"error of {sum(errors) / len(errors):.2f} eV."
                )
        both = [item for item in self.relaxed if item.dft is not None and item.teacher is not None]
        apart = {item.system: abs(item.dft - item.teacher) for item in both}  # type: ignore[operator]
        if apart:
            sentences.append(
                f"SevenNet-0 and DFT themselves differ by {sum(apart.values()) / len(apart):.2f} eV on "
                "average over these DFT systems: their labels are not the same."
            )
        return sentences

    def _pruning_table(self) -> str:
        dense, cut, small = self.networks[2:]
        rows = []
        for network in (dense, cut, small):
            timed = network.milliseconds == network.milliseconds
            rows.append(
                [
                    network.title,
                    f"{network.parameters:,}",
                    f"{network.macs / 1e6:,.0f}" if timed else "",
                    f"{network.milliseconds:.1f}" if timed else "",
                    *_errors(network)[:3],
                ]
            )
        head = ["network", "parameters", "million multiply-accumulates", "force call (ms)"]
        return table([*head, "energy MAE (eV)", "force MAE (eV/Å)", "force cosine"], rows)

    def _pruning_verdicts(self) -> list[str]:
        dense, cut, small = self.networks[2:]
        before, lost, after = (network.result.metrics["forces_mae"] for network in (dense, cut, small))
        return [
            f"The pruned network needs {small.macs / dense.macs:.0%} of the operations and "
            f"{small.milliseconds / dense.milliseconds:.0%} of the time of a force call.",
            f"Its force error on unseen systems is {after / before:.2f} times that of the dense network; "
            f"without distillation {lost / before:.2f} times.",
        ]

    def _weak_points(self) -> list[str]:
        """Sentences about what these figures do not show, and what is bad about them."""
        mean, zero = self._baselines
        tuned = self.networks[2].result
        sentences = []
        ratio = tuned.metrics["energy_mae"] / mean
        if ratio > 0.5:
            sentences.append(
                f"Energies of unseen systems are off by {tuned.metrics['energy_mae']:.2f} eV on average, "
                "useless for chemistry: ten DFT relaxations do not teach the energy of another surface."
            )
        if tuned.metrics["forces_mae"] > zero:
            sentences.append("Forces on unseen systems are worse than saying zero.")
        open_ended = [item.system for item in self.relaxed if not item.result.system.converged]
        if open_ended:
            sentences.append(
                f"{len(open_ended)} of {len(self.relaxed)} relaxations did not converge in "
                f"{self.plan.relaxation_steps} steps ({', '.join(dict.fromkeys(open_ended))})."
            )
        sentences += [
            f"{tuned.systems} systems are few: another choice of unseen systems gives other figures.",
            f"Only frames with a force of at least {self.plan.min_force:g} eV/Å on a free atom are judged, "
            "as "
            "in training: most frames of a relaxation are nearly at rest, where zero is hard to beat.",
            "SevenNet-0's relaxations end at forces of 0.1 eV/Å, so their energies are upper bounds.",
            "Models in use are trained on OC20's hundreds of thousands of systems.",
        ]
        return sentences


def _title_and_steps(network: Network) -> list[str]:
    return [network.title, f"{network.steps:,}"]


def _errors(network: Network) -> list[str]:
    metrics = network.result.metrics
    return [
        f"{metrics['energy_mae']:.3f}",
        f"{metrics['forces_mae']:.4f}",
        f"{metrics['forces_cosine_similarity']:.3f}",
        f"{metrics['energy_forces_within_threshold']:.1%}",
    ]


def table_lines(networks: Sequence[Network]) -> list[str]:
    """Lines of the table of errors as plain text, energies in eV and forces in eV/Å."""
    known = networks[2].result.baselines
    width = max(len(network.title) for network in networks)
    lines = [
        f"{'':{width}}  energy MAE (eV)  force MAE (eV/Å)  force cosine",
        f"{'trivial':{width}}  {known['mean_energy']['energy_mae']:15.3f}  "
        f"{known['zero_force']['forces_mae']:16.4f}  {0:12.3f}",
    ]
    for network in networks:
        metrics = network.result.metrics
        lines.append(
            f"{network.title:{width}}  {metrics['energy_mae']:15.3f}  {metrics['forces_mae']:16.4f}  "
            f"{metrics['forces_cosine_similarity']:12.3f}"
        )
    return lines
