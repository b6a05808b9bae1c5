"""An inspection as a record for JSON and as text."""

from typing import Any

import numpy as np
from ase.data import chemical_symbols

from datasets_oc20.inspection import PROBLEMS, FrameFacts, Inspection
from datasets_oc20.reader import OC20Lmdb

_EXAMPLES = 5


def to_record(inspection: Inspection, dataset: OC20Lmdb) -> dict[str, Any]:
    """Return plain numbers and texts for JSON; None stands for a statistic without values.

    Args:
        inspection: of the dataset.
        dataset: names files and keys.
    """

    def statistics(values: np.ndarray) -> dict[str, float] | None:
        known = values[~np.isnan(values)]
        if not len(known):
            return None
        return {
            "min": float(known.min()),
            "median": float(np.median(known)),
            "max": float(known.max()),
            "mean": float(known.mean()),
            "std": float(known.std()),
        }

    def example(frame: FrameFacts) -> dict[str, Any]:
        where = {"where": dataset.describe(frame.index)}
        if frame.message:
            return {**where, "error": frame.message}
        return {**where, "sid": frame.sid, "fid": frame.fid}

    atoms = max(sum(inspection.elements.values()), 1)
    return {
        "data": dataset.path,
        "files": len(dataset.shards),
        "frames": inspection.frames,
        "inspected": inspection.inspected,
        "readable": len(inspection.natoms),
        "systems": len(inspection.systems),
        "frames_per_system": statistics(np.array(list(inspection.systems.values()))),
        "atoms": statistics(inspection.natoms),
        "elements": {chemical_symbols[z]: n for z, n in inspection.elements.most_common()},
        "tags": {str(tag): inspection.tags[tag] / atoms for tag in (0, 1, 2)},
        "fixed": inspection.fixed_share,
        "energy_kind": inspection.kind,
        "possible_energy_kinds": inspection.possible_kinds,
        "energy": statistics(inspection.energy),
        "max_force": statistics(inspection.max_force),
        "forces_rms": None if np.isnan(inspection.forces_rms) else inspection.forces_rms,
        "suspicious_frames": inspection.num_suspicious,
        "problems": {
            name: {
                "meaning": PROBLEMS[name],
                "frames": len(frames),
                "examples": [example(frame) for frame in frames[:_EXAMPLES]],
            }
            for name, frames in inspection.problems.items()
        },
    }


def to_text(record: dict[str, Any]) -> str:
    """Format the record of an inspection for people, in some lines.

    Args:
        record: as `to_record` returns it.
    """

    def numbers(values: dict[str, float]) -> str:
        limits = f"{values['min']:.3f} to {values['max']:.3f}"
        return f"{limits}, mean {values['mean']:.3f}, std {values['std']:.3f}"

    def energies() -> str:
        kind, possible = record["energy_kind"], record["possible_energy_kinds"]
        if record["energy"] is None:
            return "none"
        values = f"{numbers(record['energy'])} eV"
        if kind is None and len(possible) == 1:
            return f"{values}; of a kind that is not declared, by their size {possible[0]}"
        if kind is None:
            return f"{values}; of a kind that is not declared"
        if kind not in possible:
            return f"{values}; declared {kind}, which they CANNOT be by their size: training will refuse them"
        return f"{values}; declared {kind}"

    def forces() -> str:
        if record["forces_rms"] is None:
            return "none on free atoms"
        return (
            f"rms {record['forces_rms']:.3f} eV/Å of a component on free atoms; largest force of a frame "
            f"{numbers(record['max_force'])} eV/Å"
        )

    inspected, frames = record["inspected"], record["frames"]
    part = "all inspected" if inspected == frames else f"{inspected:,} of them inspected, evenly spread"
    lines = [f"data      {record['data']}: {record['files']} file(s), {frames:,} frames, {part}"]
    if record["readable"]:
        per_system, atoms, tags = record["frames_per_system"], record["atoms"], record["tags"]
        elements = record["elements"]
        common = ", ".join(list(elements)[:12]) + (", …" if len(elements) > 12 else "")
        lines += [
            f"systems   {record['systems']:,}, of {per_system['min']:.0f} to {per_system['max']:.0f} frames",
            f"atoms     {atoms['min']:.0f} to {atoms['max']:.0f} per frame, {atoms['mean']:.1f} on average",
            f"elements  {len(elements)}: {common}",
            "tags      "
            + ", ".join(f"{tag}: {tags[tag]:.1%}" for tag in tags)
            + f" of the atoms; {record['fixed']:.1%} are fixed",
        ]
    lines += [f"energy    {energies()}", f"forces    {forces()}"]
    lines.append(f"suspicious frames: {record['suspicious_frames']:,}")
    for problem in record["problems"].values():
        example = problem["examples"][0]
        name = example.get("error") or f"{example['sid']} frame {example['fid']} ({example['where']})"
        lines.append(f"  {problem['frames']:>8,}  {problem['meaning']}; e.g. {name}")
    return "\n".join(lines)
