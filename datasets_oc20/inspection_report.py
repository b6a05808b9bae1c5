"""An inspection as a record for JSON and as text."""

from typing import Any

import numpy as np
from ase.data import chemical_symbols

from datasets_oc20.inspection import PROBLEMS, FrameFacts, Inspection
from datasets_oc20.reader import OC20Lmdb

_EXAMPLES = 5


def to_record(found: Inspection, dataset: OC20Lmdb) -> dict[str, Any]:
    """Plain numbers and texts; None where there is nothing to measure."""
    atoms = max(sum(found.elements.values()), 1)
    per_system = np.array(list(found.systems.values()))
    return {
        "data": dataset.path,
        "files": len(dataset.shards),
        "frames": found.frames,
        "inspected": found.inspected,
        "readable": len(found.natoms),
        "systems": len(found.systems),
        "frames_per_system": _spread(per_system),
        "atoms": _spread(found.natoms),
        "elements": {chemical_symbols[z]: n for z, n in found.elements.most_common()},
        "tags": {str(tag): found.tags[tag] / atoms for tag in (0, 1, 2)},
        "fixed": found.fixed_share,
        "energy_kind": found.kind,
        "possible_energy_kinds": found.possible_kinds,
        "energy": _spread(found.energy),
        "max_force": _spread(found.max_force),
        "forces_rms": None if np.isnan(found.forces_rms) else found.forces_rms,
        "suspicious_frames": suspicious(found),
        "problems": {
            name: {
                "meaning": PROBLEMS[name],
                "frames": len(frames),
                "examples": [_example(one, dataset) for one in frames[:_EXAMPLES]],
            }
            for name, frames in found.problems.items()
        },
    }


def suspicious(found: Inspection) -> int:
    """The number of frames with at least one problem."""
    return len({one.index for frames in found.problems.values() for one in frames})


def to_text(record: dict[str, Any]) -> str:
    """What a person wants to know, in some lines."""
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
    lines += [f"energy    {_energy_text(record)}", f"forces    {_forces_text(record)}"]
    lines.append(f"suspicious frames: {record['suspicious_frames']:,}")
    for problem in record["problems"].values():
        example = problem["examples"][0]
        lines.append(f"  {problem['frames']:>8,}  {problem['meaning']}; e.g. {_name(example)}")
    return "\n".join(lines)


def _energy_text(record: dict[str, Any]) -> str:
    kind, possible, energy = record["energy_kind"], record["possible_energy_kinds"], record["energy"]
    if energy is None:
        return "none"
    values = f"{_numbers(energy)} eV"
    if kind is None and len(possible) == 1:
        return f"{values}; of a kind that is not declared, by their size {possible[0]}"
    if kind is None:
        return f"{values}; of a kind that is not declared"
    if kind not in possible:
        return f"{values}; declared {kind}, which they CANNOT be by their size: training will refuse them"
    return f"{values}; declared {kind}"


def _forces_text(record: dict[str, Any]) -> str:
    if record["forces_rms"] is None:
        return "none on free atoms"
    return (
        f"rms {record['forces_rms']:.3f} eV/Å of a component on free atoms; largest force of a frame "
        f"{_numbers(record['max_force'])} eV/Å"
    )


def _numbers(spread: dict[str, float]) -> str:
    return f"{spread['min']:.3f} to {spread['max']:.3f}, mean {spread['mean']:.3f}, std {spread['std']:.3f}"


def _spread(values: np.ndarray) -> dict[str, float] | None:
    there = values[~np.isnan(values)]
    if not len(there):
        return None
    return {
        "min": float(there.min()),
        "median": float(np.median(there)),
        "max": float(there.max()),
        "mean": float(there.mean()),
        "std": float(there.std()),
    }


def _example(one: FrameFacts, dataset: OC20Lmdb) -> dict[str, Any]:
    where = {"where": dataset.describe(one.index)}
    return {**where, "error": one.message} if one.message else {**where, "sid": one.sid, "fid": one.fid}


def _name(example: dict[str, Any]) -> str:
    return example.get("error") or f"{example['sid']} frame {example['fid']} ({example['where']})"
