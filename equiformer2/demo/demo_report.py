"""The demo's report: one HTML file with everything in it."""

import base64
import html
from dataclasses import dataclass
from pathlib import Path

from equiformer2.demo.plan import DemoPlan
from equiformer2.demo.steps import Judged, Relaxed

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } img { max-width: 100%; }
.note { background: #f5f5f0; padding: .6rem 1rem; border-left: 4px solid #999; }
"""


@dataclass(frozen=True)
class DemoReport:
    """Results of the demo and the page that shows them.

    Attributes:
        plan: sizes of the demo.
        judged: errors by dataset.
        relaxed: relaxations; the first is shown in full.
        figures: caption to PNG file.
        seconds: wall time of each step.
    """

    plan: DemoPlan
    judged: dict[str, Judged]
    relaxed: list[Relaxed]
    figures: dict[str, Path]
    seconds: dict[str, float]

    def to_html(self) -> str:
        """Write one HTML page with everything in it, figures included; missing figures are left out."""

        def figure(caption: str, path: Path) -> str:
            caption = html.escape(caption)
            data = base64.b64encode(path.read_bytes()).decode()
            return f"<h3>{caption}</h3><img alt='{caption}' src='data:image/png;base64,{data}'>"

        shown = self.relaxed[0]
        parts = [
            "<!doctype html><html lang='en'><meta charset='utf-8'><title>equiformer2 demo</title>",
            f"<style>{_STYLE}</style>",
            "<h1>equiformer2 demo</h1>",
            "<p>A small EquiformerV2 was trained from nothing on this machine: first on adsorbate slabs "
            "labelled by a universal potential (SevenNet-0, <b>not DFT</b>), then on frames of real OC20 DFT "
            "relaxations (VASP, RPBE; Chanussot et al. 2021, CC-BY-4.0). All figures below are against "
            "DFT.</p>",
            f"<h2>Adsorption energy of {html.escape(shown.result.adsorbate_formula)} "
            f"({html.escape(shown.system)})</h2>",
            f"<p>Relaxed with the trained model: <b>{shown.result.energy:.2f} eV</b>. DFT, relaxed by DFT: "
            f"<b>{shown.dft_relaxed:.2f} eV</b>. Frames of DFT's relaxation of this system were trained on; "
            "of the other systems in the table nothing was.</p>",
            self._relaxation_table(),
            "<h2>Errors beside trivial answers</h2>",
            self._error_table(),
            f"<div class='note'>{self._interpretation()}</div>",
            *(figure(caption, path) for caption, path in self.figures.items() if path.exists()),
            "<h2>Time</h2><p>"
            + ", ".join(f"{html.escape(name)} {value:.0f} s" for name, value in self.seconds.items())
            + f". Training: {self.plan.teacher_time} s on teacher labels, {self.plan.dft_time} s on DFT "
            "frames.</p></html>",
        ]
        return "\n".join(parts)

    def _error_table(self) -> str:
        rows = ["<tr><th>frames</th><th>quantity</th><th>model</th><th>trivial answers</th></tr>"]
        for name, item in self.judged.items():
            metrics, zero = item.result.metrics, item.result.baselines["zero_force"]
            own = (
                ""
                if item.system_mean is None
                else f"; mean of the system's training frames {item.system_mean:.3f}"
            )
            label = f"{html.escape(name)}: {item.result.structures} of {item.result.systems} systems"
            rows += [
                f"<tr><td>{label}</td><td>energy MAE (eV)</td><td>{metrics['energy_mae']:.3f}</td>"
                f"<td>mean of all training frames {item.mean_energy:.3f}{own}</td></tr>",
                f"<tr><td></td><td>force MAE (eV/Å)</td><td>{metrics['forces_mae']:.4f}</td>"
                f"<td>zero force {zero['forces_mae']:.4f}</td></tr>",
                f"<tr><td></td><td>force cosine</td><td>{metrics['forces_cosine_similarity']:.3f}</td>"
                "<td>zero force 0</td></tr>",
            ]
        return f"<table>{''.join(rows)}</table>"

    def _interpretation(self) -> str:
        """Explain the errors in sentences that follow from the figures."""
        sentences = []
        for name, item in self.judged.items():
            metrics = item.result.metrics
            trivial = min(value for value in (item.mean_energy, item.system_mean) if value is not None)
            zero = item.result.baselines["zero_force"]["forces_mae"]
            sentences.append(
                f"On {html.escape(name)} the energy error is {metrics['energy_mae'] / trivial:.2f} times the "
                f"best trivial answer's, the force error {metrics['forces_mae'] / zero:.2f} times that of "
                "saying zero."
            )
        sentences.append(
            f"Only frames with a force of at least {self.plan.min_force:g} eV/Å on a free atom are judged, "
            "in training as here: most frames of a relaxation are nearly at rest, where zero is hard to "
            "beat. Later frames are one block of these in the second half of every relaxation; frames before "
            "and behind it were trained on, so this is interpolation, easier than going on with a relaxation."
        )
        sentences.append(
            "Later frames belong to relaxations the model has learned other frames of: this should succeed. "
            "Systems never seen are the honest hard case: minutes of training on some two hundred surfaces "
            "teach how atoms push and pull on each other, but hardly the absolute energy of another surface. "
            "Models in use are trained on OC20's hundreds of thousands of systems; do not use this one for "
            "chemistry."
        )
        return " ".join(sentences)

    def _relaxation_table(self) -> str:
        rows = [
            "<tr><th>system</th><th>in training</th><th>adsorbate</th><th>model, relaxed (eV)</th>"
            "<th>DFT, relaxed (eV)</th>"
            "<th>DFT, start (eV)</th><th>steps</th><th>converged</th></tr>"
        ]
        for item in self.relaxed:
            run = item.result.system
            rows.append(
                f"<tr><td>{html.escape(item.system)}</td><td>{'yes' if item.seen else 'no'}</td>"
                f"<td>{html.escape(item.result.adsorbate_formula)}</td>"
                f"<td>{item.result.energy:.2f}</td><td>{item.dft_relaxed:.2f}</td><td>{item.dft_start:.2f}</td>"
                f"<td>{run.steps}</td><td>{'yes' if item.result.converged else 'no'}</td></tr>"
            )
        return f"<table>{''.join(rows)}</table>"


def error_lines(judged: dict[str, Judged]) -> list[str]:
    """Lines of the table of errors as plain text, energies in eV and forces in eV/Å."""
    lines = []
    for name, item in judged.items():
        metrics, zero = item.result.metrics, item.result.baselines["zero_force"]
        own = "" if item.system_mean is None else f", per-system training mean {item.system_mean:.3f}"
        lines += [
            f"{name} ({item.result.structures} frames of {item.result.systems} systems)",
            f"  energy MAE   {metrics['energy_mae']:.3f} eV    (training mean {item.mean_energy:.3f}{own})",
            f"  force MAE    {metrics['forces_mae']:.4f} eV/Å (zero force {zero['forces_mae']:.4f})",
            f"  force cosine {metrics['forces_cosine_similarity']:.3f}       (zero force 0)",
        ]
    return lines
