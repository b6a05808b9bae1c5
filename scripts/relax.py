"""Relax a structure with a trained EquiformerV2.

Free atoms move until no force exceeds --fmax; constraints stored in the file hold. What the energy means
(adsorption or total) depends on the checkpoint and is printed. A relaxation that has not converged after all
its steps is written all the same; the last line says so, and the exit status is 3.

    python scripts/relax.py --checkpoint model.pt --structure slab.traj --out runs/relax
"""

import argparse

from equiformer2.inference import EquiformerV2Calculator, relax
from equiformer2.inference.meaning import warning_for
from equiformer2.inference.record import (
    RELAXATION_RECORD,
    RUN_FILES,
    claim_folder,
    model_record,
    write_relaxation_record,
)
from equiformer2.inference.relaxation import OPTIMIZERS
from equiformer2.inference.structure_files import read_structure
from equiformer2.pruning.routing import FrozenPlan
from equiformer2.pruning.routing.router_files import for_relaxation
from equiformer2.script import add_model_arguments, add_router_argument, run_script, show_log


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    show_log()
    structure = read_structure(options.structure, options.index)
    router = for_relaxation(options.router, options.replan_every)
    calculator = EquiformerV2Calculator(
        options.checkpoint,
        device=options.device,
        weights=options.weights,
        energy_kind=options.energy_kind,
        precision=options.precision,
        backend=options.backend,
        router=router,
    )
    inputs = [options.structure, options.checkpoint, *filter(None, [options.router])]
    folder = claim_folder(options.out, RELAXATION_RECORD, options.overwrite, inputs, RUN_FILES)
    result = relax(
        structure,
        calculator,
        optimizer=options.optimizer,
        fmax=options.fmax,
        steps=options.steps,
        trajectory=folder / "relaxation.traj",
        progress=True,
        forces_on_fixed=options.forces_on_fixed,
        energy_every=options.energy_every,
    )
    model = model_record(calculator.predictor, options.checkpoint)
    if router is not None:
        model["router"] = options.router
        model["replan_every"] = router.replan_every if isinstance(router, FrozenPlan) else None
    write_relaxation_record(folder, structure, result, model)
    print(f"saved in {folder}: {RELAXATION_RECORD}, trajectory, relaxed structure, pictures")
    if warning_for(structure, calculator.energy_kind) is None:
        print(f"{calculator.energy_kind} energy: {result.energy:.4f} eV")
    else:  # the log has said why
        print(f"model output: {result.energy:.4f}, which is not an energy of this structure")
    print(f"{result.atoms.get_chemical_formula()}: {result.outcome()}")
    return 0 if result.converged else 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_model_arguments(parser)
    add_router_argument(parser)
    parser.add_argument(
        "--replan-every",
        type=int,
        metavar="N",
        help="steps for which a router that jumps keeps its choice (default: what its file says, or 10)",
    )
    parser.add_argument("--structure", required=True, help="any structure file ASE reads")
    parser.add_argument(
        "--index", type=_frame, default=-1, help="number of one frame of the file (default: -1, the last)"
    )
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="LBFGS")
    parser.add_argument("--fmax", type=float, default=0.05, help="eV/Å (default: 0.05)")
    parser.add_argument("--steps", type=int, default=300, help="most steps (default: 300)")
    parser.add_argument(
        "--energy-every", type=int, default=1, help="energies of every n-th frame only (default: %(default)s)"
    )
    parser.add_argument(
        "--forces-on-fixed", action="store_true", help="compute forces on held atoms too (they are zero else)"
    )
    parser.add_argument("--out", default="runs/relax", help="output folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result in --out")
    return parser


def _frame(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the number of one frame, such as 0 or -1: one structure is relaxed at a time; "
            "many are relaxed by scripts/relax_is2re.py, from an LMDB, or by a loop over --index"
        ) from None


if __name__ == "__main__":
    run_script(main)
