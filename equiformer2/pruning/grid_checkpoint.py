"""A checkpoint with other S2 grids."""

from pathlib import Path

from equiformer2.checkpoint import load_checkpoint, save_checkpoint
from equiformer2.files import check_target
from equiformer2.pruning.grid import GridChoice, with_grids


def write_with_grids(
    source: str | Path, energy_kind: str | None, choice: GridChoice, out: str | Path
) -> None:
    """Write `source` with the chosen grids, with all the weights that it holds.

    Raises:
        InputError: `source` cannot be read, or does not state its kind of energy and `energy_kind` is None;
            or `out` is `source`.
        OSError: `out` cannot be written.
    """
    check_target(out, inputs=[source])
    loaded = load_checkpoint(source, energy_kind=energy_kind)
    states = {
        kind: load_checkpoint(source, kind, energy_kind).model.state_dict()
        for kind in loaded.available_weights
    }
    save_checkpoint(
        out,
        model=with_grids(loaded.model, choice.resolution),
        raw_state=states.get("raw"),
        averaged_state=states.get("averaged"),
        normalizers=loaded.normalizers,
        energy_kind=loaded.energy_kind,
        provenance={**loaded.provenance, "grids_tuned": {"measure": choice.measure, "tol": choice.tol}},
    )
