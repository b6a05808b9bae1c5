"""OC20's 86 adsorbates as the JSON file that the package ships.

    pip install 'fairchem-data-oc==1.0.2'
    python -m studies.make_adsorbates --out equiformer2/adsorption/oc20_adsorbates.json

The structures, names and binding atoms are those of `adsorbates.pkl` of `fairchem-data-oc` 1.0.2 (MIT), in
its order; positions are rounded to 1e-6 Å.
"""

import argparse
import json
from importlib.metadata import files, version
from pathlib import Path
from typing import Any

from equiformer2.adsorption.open_catalyst import open_catalyst
from equiformer2.files import write_bytes
from equiformer2.script import run_script

COUNT = 86


def adsorbate_record(adsorbate: Any) -> dict[str, Any]:
    """Plain values of one adsorbate of `fairchem-data-oc`."""
    return {
        "name": adsorbate.smiles,
        "symbols": adsorbate.atoms.get_chemical_symbols(),
        "binding_indices": [int(index) for index in adsorbate.binding_indices],
        "positions_A": adsorbate.atoms.positions.round(6).tolist(),
    }


def main() -> int:
    """Read the adsorbates of the installed package and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="JSON file to write")
    options = parser.parse_args()
    core = open_catalyst()
    licence = next(file for file in files("fairchem-data-oc") or [] if file.name.startswith("LICENSE"))
    head = {
        "source": f"fairchem-data-oc {version('fairchem-data-oc')}, databases/pkls/adsorbates.pkl",
        "reference": "Chanussot et al., ACS Catal. 11, 6059 (2021), 10.1021/acscatal.0c04525",
        "licence": " ".join(Path(str(licence.locate())).read_text(encoding="utf-8").split()),
    }
    rows = [adsorbate_record(core.Adsorbate(adsorbate_id_from_db=number)) for number in range(COUNT)]
    lines = [f'  "{key}": {json.dumps(value)},' for key, value in head.items()]
    body = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in rows)
    text = "\n".join(["{", *lines, '  "adsorbates": [', body, "  ]", "}"]) + "\n"
    write_bytes(options.out, text.encode())
    print(f"{len(rows)} adsorbates in {options.out}")
    return 0


if __name__ == "__main__":
    run_script(main)
