"""Paths between minima in the report of a search: profiles, and structures that can be turned and played."""

import re
from pathlib import Path
from typing import Any

from datasets_oc20.own_data.reading import SourceFile
from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.search_folder import NEB, REPORT
from equiformer2.errors import InputError
from equiformer2.files import as_input_error, read_json, write_bytes
from equiformer2.report import bullets, picture, structure_viewer

_BEGIN, _END = "<!-- paths -->", "<!-- end of paths -->"
_OF_RECORD = {
    *("start", "end", "barrier_eV", "reverse_barrier_eV", "reaction_energy_eV", "energies_eV"),
    *("steps", "model_evaluations", "max_force_eV_A", "converged"),
}


def path_section(folder: AnyPath) -> str:
    """HTML about all paths in the folder of a search; between two comments, which `update_report` replaces.

    Raises:
        InputError: files of a path cannot be read.
    """
    parts = []
    for number, file in enumerate(sorted(Path(folder).glob(f"{NEB}/*/neb.json"))):
        parts += _path(number, file)
    return "\n".join([_BEGIN, *(["<h2>Paths between minima</h2>"] if parts else []), *parts, _END])


def update_report(folder: AnyPath) -> None:
    """Write the paths that are in the folder of a search into its report, if it has one.

    Raises:
        InputError: files of a path cannot be read.
    """
    report = Path(folder) / REPORT
    if not report.is_file():
        return
    text = report.read_text(encoding="utf-8")
    section = path_section(folder)
    known = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    if known.search(text):
        text = known.sub(lambda _: section, text, count=1)
    else:
        text = text.replace("</html>", f"{section}\n</html>")
    write_bytes(report, text.encode())


def _path(number: int, file: Path) -> list[str]:
    """Profile, numbers and structures of one path."""
    record: dict[str, Any] = read_json(file)
    if not record.keys() >= _OF_RECORD:
        raise InputError(f"{file} is broken: remove its folder, and find the path again")
    with as_input_error():
        frames = [one.atoms for one in SourceFile(file.with_name("neb.traj")).frames()]
    images = [atoms for atoms in frames if atoms is not None]
    captions = [f"{place}: {energy:.2f} eV" for place, energy in enumerate(record["energies_eV"])]
    name = f"{record['start']} to {record['end']}"
    sentences = [
        f"barrier {record['barrier_eV']:.3f} eV, back {record['reverse_barrier_eV']:.3f} eV; energy of the "
        f"end above the start {record['reaction_energy_eV']:+.3f} eV",
        f"{record['steps']} steps, {record['model_evaluations']} evaluations of the model, largest force on "
        f"the band {record['max_force_eV_A']:.3f} eV/Å",
    ]
    sentences += record.get("warnings", [])
    sentences += (record.get("familiarity") or {}).get("sentences", [])
    if not record["converged"]:
        sentences.append("NOT converged: the barrier is not that of a minimum-energy path")
    shown = dict(zip(captions, images, strict=False))
    fallback = "<p>This browser does not draw in three dimensions.</p>"
    return [
        picture(name, file.with_name("neb.png").read_bytes()),
        bullets(sentences),
        structure_viewer(f"path-{number}", shown, fallback, play=True),
    ]
