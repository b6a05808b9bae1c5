"""Options that several commands have, each written once, and checks of how options go together."""

import argparse
import contextlib
import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from equiformer2.errors import InputError
from equiformer2.shipped import find_checkpoint

Options = argparse.ArgumentParser | argparse._ArgumentGroup

ENERGY_KINDS = ("adsorption", "total")
OPTIMIZERS = ("LBFGS", "FIRE", "BFGS")  # the keys of inference.relaxation.OPTIMIZERS, which needs ASE


def checkpoint_file(text: str) -> str:
    """Path of a checkpoint from a path or a bare name, for `type=` of options."""
    try:
        return str(find_checkpoint(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def random_seed(text: str) -> int:
    """Seed that every generator takes, 0 to 2^32 - 1, for `type=` of options."""
    with contextlib.suppress(ValueError):
        if 0 <= (seed := int(text)) < 2**32:
            return seed
    raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of 0 to {2**32 - 1}")


NETWORK_ONLY = tuple(
    (option, "--calculator")
    for option in (
        *("--adapter", "--weights", "--device", "--precision", "--backend", "--router"),
        *("--stop-at-spread", "--twin-bf16"),
    )
)
"""Options that mean nothing with `--calculator`, for `parse_checked`."""


def only_one(values: list[Any]) -> Any:
    """Return the only value of a list, or the list of several."""
    return values[0] if len(values) == 1 else values


def add_checkpoint_arguments(
    parser: Options,
    weights: bool = True,
    committee: bool = False,
    calculator: bool = False,
    required: bool = True,
) -> None:
    """Add `--checkpoint` and `--weights`.

    Args:
        parser: of the command.
        weights: add `--weights`.
        committee: let `--checkpoint` take several.
        calculator: add `--calculator`, which stands in place of `--checkpoint`.
        required: refuse a command line without a model.
    """
    several = ", or several of them, a committee: their mean and spread" if committee else ""
    one_of: Any = parser
    if calculator:
        one_of = parser.add_mutually_exclusive_group(required=required)
        one_of.add_argument(
            "--calculator",
            metavar="NAME|MODULE:FACTORY",
            help="ASE calculator in place of a checkpoint: ASE's name of it (emt, lj, …), or the function or "
            "class that makes it, such as my_module:make; this imports and runs the module, so name only "
            "code that you trust",
        )
    one_of.add_argument(
        "--checkpoint",
        required=required and not calculator,
        nargs="+" if committee else None,
        type=checkpoint_file,
        metavar="FILE|NAME",
        help="native, OCP or fairchem v1 checkpoint file, or the name of a shipped model such as oc20_small"
        + several,
    )
    if weights:
        parser.add_argument(
            "--weights",
            choices=("raw", "averaged"),
            help="weights of the checkpoint (default: averaged where the file has them)",
        )


def add_twin_argument(parser: Options) -> None:
    """Add `--twin-bf16`, of a committee."""
    parser.add_argument(
        "--twin-bf16",
        action="store_true",
        help="let the first checkpoint vote a second time, in bfloat16: with it, and with its pruned copy, a "
        "committee without further training, whose spread tells of rounding and pruning, not of what all of "
        "them have wrong",
    )


def add_spread_argument(parser: Options) -> None:
    """Add `--stop-at-spread`, of a relaxation with a committee."""
    parser.add_argument(
        "--stop-at-spread",
        type=float,
        metavar="X",
        help="end a relaxation once the forces of a committee on an atom differ by more than this standard "
        "deviation, eV/Å",
    )


def add_energy_kind_argument(parser: Options, subject: str = "data that does not declare it") -> None:
    """Add `--energy-kind`."""
    parser.add_argument("--energy-kind", choices=ENERGY_KINDS, help=f"kind of the energies, for {subject}")


def add_device_argument(parser: Options) -> None:
    """Add `--device`."""
    parser.add_argument(
        "--device", default="cpu", help="device of the network: cpu, cuda, cuda:1, … (default: %(default)s)"
    )


def add_model_arguments(
    parser: Options,
    committee: bool = False,
    calculator: bool = False,
    required: bool = True,
    adapter: bool = True,
) -> None:
    """Add all options of a network that is run: file, adapter, weights, kind, device, precision, backend.

    Args:
        parser: of the command.
        committee: let `--checkpoint` take several.
        calculator: add `--calculator`, which stands in place of `--checkpoint`: the options of
            `chosen_model.ChosenModel`.
        required: refuse a command line without a model.
        adapter: add `--adapter`; commands that rewrite the weights themselves take a merged checkpoint.
    """
    add_checkpoint_arguments(parser, committee=committee, calculator=calculator, required=required)
    if adapter:
        parser.add_argument(
            "--adapter",
            metavar="FILE",
            help="adapter of `equiformer2 finetune --adapter` for the network of the checkpoint",
        )
    add_energy_kind_argument(parser, "a checkpoint or data that do not declare it; must not contradict them")
    add_device_argument(parser)
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "tf32", "bf16"),
        help="precision of the matrix products (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "torch", "cpp", "compile", "triton"),
        help="implementation of the hot operations (default: %(default)s)",
    )


def add_dispersion_argument(parser: Options) -> None:
    """Add `--d3`, of relaxations and adsorption energies."""
    parser.add_argument(
        "--d3",
        metavar="FUNCTIONAL[/DAMPING]",
        help="add DFT-D3 dispersion with the parameters of a functional, that of the model's labels: rpbe "
        "for OC20's, pbe, pbe/d3zero, … (damping: d3bj unless given); needs the extra d3",
    )


def add_corrections_argument(parser: Options, text: str) -> None:
    """Add `--corrections`; `text` says what they change."""
    parser.add_argument(
        "--corrections",
        metavar="FILE",
        help=f"JSON object or CSV file of corrections by species, eV ({text}): gases such as CO, and "
        "adsorbates with a star such as *OH",
    )


def add_draft_argument(parser: Options) -> None:
    """Add `--draft`, of relaxations."""
    parser.add_argument(
        "--draft",
        type=checkpoint_file,
        metavar="FILE|NAME",
        help="checkpoint of a cheaper network, such as a pruned one, that relaxes first; the result is a "
        "minimum of the full model all the same",
    )


def add_router_argument(parser: Options) -> None:
    """Add `--router`."""
    parser.add_argument(
        "--router",
        metavar="FILE",
        help="router of `equiformer2 prune route` or of training, by which atoms or edges are skipped "
        "(backends auto, torch, cpp)",
    )


def add_batch_arguments(parser: Options, batch_size: int = 8, workers: bool = True) -> None:
    """Add `--batch-size`, `--max-atoms` and `--num-workers`."""
    add_batch_size_argument(parser, batch_size)
    parser.add_argument("--max-atoms", type=int, help="maximum number of atoms per batch (default: no limit)")
    if workers:
        parser.add_argument(
            "--num-workers", type=int, default=0, help="number of loader processes (default: %(default)s)"
        )


def add_batch_size_argument(parser: Options, batch_size: int) -> None:
    """Add `--batch-size`."""
    parser.add_argument(
        "--batch-size",
        type=int,
        default=batch_size,
        help="maximum number of systems per batch (default: %(default)s)",
    )


def add_worker_argument(parser: Options) -> None:
    """Add `--num-workers` of commands that work on data in several processes."""
    parser.add_argument("--num-workers", type=int, help="number of processes (default: one per core)")


def add_data_argument(parser: Options) -> None:
    """Add `--data` with one or several paths."""
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        type=Path,
        help="LMDB or ASE-LMDB files, small sets of other files that ASE reads (`equiformer2 data import`), "
        "or folders of them",
    )


def add_overwrite_argument(
    parser: Options, text: str = "replace what an earlier call wrote to --out"
) -> None:
    """Add `--overwrite`."""
    parser.add_argument("--overwrite", action="store_true", help=text)


def add_relaxation_arguments(parser: Options) -> None:
    """Add `--optimizer`, `--fmax` and `--steps` of one relaxation."""
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="LBFGS", help="ASE optimizer (default: %(default)s)"
    )
    parser.add_argument(
        "--fmax",
        type=float,
        default=0.05,
        help="convergence threshold of the largest force on a free atom, eV/Å (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=300, help="maximum number of optimizer steps (default: %(default)s)"
    )


def add_calibration_arguments(parser: Options, structures: int = 32, batch_size: int = 8) -> None:
    """Add `--structures`, `--batch-size` and `--seed` of commands that run a network on a sample of data."""
    parser.add_argument(
        "--structures",
        type=int,
        default=structures,
        help="maximum number of structures that are drawn from the data (default: %(default)s)",
    )
    add_batch_size_argument(parser, batch_size)
    parser.add_argument("--seed", type=random_seed, default=0, help="random seed (default: %(default)s)")


def parse_checked(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    needs: Iterable[tuple[str, str]] = (),
    excludes: Iterable[tuple[str, str]] = (),
) -> argparse.Namespace:
    """Parse a command line and refuse options that would be ignored, as argparse refuses (status 2).

    Args:
        parser: parser of the command.
        arguments: words of the command line.
        needs: pairs of an option and the one without which it means nothing.
        excludes: pairs of an option and one, or `--option=choice`, beside which it means nothing.
    """
    options = parser.parse_args(arguments)
    sparse = copy.deepcopy(parser)  # its defaults are left out, so that it tells what is on the command line
    for action in sparse._actions:
        action.default, action.required = argparse.SUPPRESS, False
    given = set(vars(sparse.parse_args(arguments)))

    def is_given(option: str) -> bool:
        name, _, choice = option.partition("=")
        dest = name.removeprefix("--").replace("-", "_")
        return str(getattr(options, dest)) == choice if choice else dest in given

    for option, other in needs:
        if is_given(option) and not is_given(other):
            parser.error(f"{option} has no meaning without {other}: give both, or leave it out")
    for option, other in excludes:
        if is_given(option) and is_given(other):
            parser.error(f"{option} has no meaning with {other.replace('=', ' ')}: leave one of them out")
    return options
