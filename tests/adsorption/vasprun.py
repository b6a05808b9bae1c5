"""A `vasprun.xml` with the parts that ASE and the importer read, of structures with energies and forces."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms


def write_vasprun(path: Path, frames: Sequence[Atoms], functional: str = "RP", cutoff: float = 350.0) -> Path:
    """Write an ionic relaxation; the atoms of every frame are grouped by element already."""

    def vectors(name: str, values: np.ndarray) -> str:
        rows = "".join("<v>{:.8f} {:.8f} {:.8f}</v>".format(*row) for row in values)
        return f'<varray name="{name}">{rows}</varray>'

    def structure(atoms: Atoms, name: str = "") -> str:
        basis = vectors("basis", atoms.cell.array)
        crystal = f'<crystal>{basis}<i name="volume">{atoms.get_volume():.6f}</i></crystal>'
        return f"<structure{name}>{crystal}{vectors('positions', atoms.get_scaled_positions())}</structure>"

    first = frames[0]
    symbols = first.get_chemical_symbols()
    kinds = list(dict.fromkeys(symbols))
    rows = "".join(f"<rc><c>{symbol}</c><c>{kinds.index(symbol) + 1}</c></rc>" for symbol in symbols)
    types = "".join(
        f"<rc><c>{symbols.count(kind)}</c><c>{kind}</c><c>1.0</c><c>1.0</c><c>PAW_PBE {kind}</c></rc>"
        for kind in kinds
    )
    steps = "".join(
        "<calculation><scstep><energy>"
        f'<i name="e_fr_energy">{energy:.8f}</i><i name="e_wo_entrp">{energy:.8f}</i>'
        f'<i name="e_0_energy">{energy:.8f}</i></energy></scstep>{structure(atoms)}'
        f"{vectors('forces', atoms.calc.results['forces'])}"
        f'<energy><i name="e_fr_energy">{energy:.8f}</i><i name="e_0_energy">{energy:.8f}</i></energy>'
        "</calculation>"
        for atoms, energy in ((atoms, atoms.calc.results["energy"]) for atoms in frames)
    )
    path.write_text(
        '<?xml version="1.0" encoding="ISO-8859-1"?><modeling><generator><i name="program">vasp</i>'
        '<i name="version">5.4.4</i></generator>'
        f'<incar><i type="string" name="GGA">{functional}</i><i name="ENCUT">{cutoff}</i></incar>'
        '<kpoints><varray name="kpointlist"><v>0 0 0</v></varray><varray name="weights"><v>1</v></varray>'
        "</kpoints>"
        f'<parameters><separator name="electronic"><i name="ENMAX">{cutoff}</i>'
        f'<i type="int" name="NELM">60</i><i type="string" name="GGA">{functional}</i></separator>'
        "</parameters>"
        f"<atominfo><atoms>{len(first)}</atoms><types>{len(kinds)}</types>"
        f'<array name="atoms"><set>{rows}</set></array><array name="atomtypes"><set>{types}</set></array>'
        f"</atominfo>{structure(first, chr(32) + 'name=' + chr(34) + 'initialpos' + chr(34))}{steps}"
        f"{structure(frames[-1], chr(32) + 'name=' + chr(34) + 'finalpos' + chr(34))}</modeling>\n"
    )
    return path
