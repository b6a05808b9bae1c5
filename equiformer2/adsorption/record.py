"""Output folder of an adsorption energy, and its report for the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.conventions import conventions
from equiformer2.adsorption.dispersion_terms import dispersion_lines
from equiformer2.adsorption.energy import AdsorptionResult
from equiformer2.files import write_json
from equiformer2.inference.atoms import ADSORBATE
from equiformer2.inference.extras import extras
from equiformer2.inference.record import ADSORPTION_RECORD, write_pictures, write_structure
from equiformer2.script import header


def write_adsorption_record(
    folder: AnyPath,
    result: AdsorptionResult,
    model: dict[str, Any],
    provenance: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write the relaxed structure, pictures and, last, `adsorption_energy.json`.

    Args:
        folder: existing folder.
        result: the adsorption energy.
        model: `model_record` of the model that calculated it.
        provenance: of its checkpoint; None for a calculator that is no network of ours.

    Returns:
        The files written.
    """
    folder = Path(folder)
    title = f"{result.name}: adsorption energy {result.energy:.3f} eV" + (
        "" if result.converged else " (not converged)"
    )
    label = "adsorption energy (eV)" if result.energy_kind == "adsorption" else "total energy (eV)"
    written = [
        write_structure(folder / "relaxed.extxyz", result.system.atoms),
        *write_pictures(folder, result.initial, result.system, title, label),
    ]
    files = [path.name for path in written] + ["relaxation.traj"]
    if result.slab is not None:
        files.append("slab.traj")
    record = {
        **header("adsorption-energy/1", model.get("checkpoint")),
        **result.summary(),
        "conventions": conventions(
            result.energy,
            result.energy_kind,
            result.initial[result.initial.get_tags() == ADSORBATE],
            None if result.gas is None else result.gas.summary(),
            provenance,
        ),
        "model": model,
        "files": files,
        "extras": extras(result.initial),
    }
    written.append(write_json(folder / ADSORPTION_RECORD, record))
    return written


def adsorption_report(result: AdsorptionResult) -> str:
    """Format the result in plain words, for the terminal."""
    system = result.system
    lines = [
        f"{result.name} ({len(system.atoms)} atoms)",
        f"adsorption energy: {result.energy:.4f} eV",
    ]
    if result.energy_std is not None:
        spread = max(system.force_spreads, default=0.0)
        lines[-1] += f" ± {result.energy_std:.4f} (spread of the committee; forces up to {spread:.3f} eV/Å)"
    lines += [f"  {line}" for line in dispersion_lines(result.d3)]
    if result.energy_kind == "adsorption":
        lines.append(
            "  the model predicts adsorption energies: this is its energy of the relaxed system, "
            "nothing was subtracted" + ("" if result.d3 is None else " but D3 of slab and gases")
        )
    else:
        assert result.gas is not None  # total energies always have one
        per_atom = ", ".join(f"{symbol} {value:.4f}" for symbol, value in result.gas_references.items())
        gas = result.gas.label + (f"; eV per atom: {per_atom}" if per_atom else "")
        lines += [
            "  the model predicts total energies:",
            f"    slab + adsorbate {result.terms['slab_and_adsorbate']:16.4f} eV",
            f"  - clean slab       {result.terms['slab']:16.4f} eV",
            f"  - gas references   {result.terms['gas']:16.4f} eV  ({gas})",
        ]
    for name, relaxation in (("slab + adsorbate", system), ("clean slab", result.slab)):
        if relaxation is not None:
            lines.append(f"{name}: {relaxation.outcome()}")
    lines.append(f"surface compared with the {result.compared_with}")
    for verdict in result.anomaly_checks:
        if verdict.present:
            lines.append(f"WARNING: {verdict} [{verdict.name}, margin {verdict.margin:.3f} Å]")
        elif verdict.borderline:
            lines.append(f"note: {verdict} [not {verdict.name}, margin {verdict.margin:.3f} Å]")
    return "\n".join(lines)
