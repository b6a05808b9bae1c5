"""ASE calculators by name, for commands that take any in place of a checkpoint; kinds of energies."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ase.calculators import calculator as ase_calculators
from ase.calculators.calculator import BaseCalculator

from equiformer2.errors import InputError

ENERGY_KINDS = ("adsorption", "total")

WRAPPERS = {
    *("checkpoint", "dftd3", "harmonic", "loggingcalc", "mixing", "plumed"),
    *("qmmm", "singlepoint", "socketio.socketio", "test"),
}
"""Modules of `ase.calculators` whose energies are of any kind, since they are another calculator's."""


def calculator_by_name(name: str) -> BaseCalculator:
    """Make an ASE calculator with its own default parameters.

    Args:
        name: ASE's name of it, in small letters (`"emt"`, `"lj"`, …), or `"module:factory"`: a class or a
            function of an installed module, or of one in the working directory, that is called without
            arguments. **This imports, and so runs, the module**: it must come from the user, never from a
            file that is data.

    Raises:
        InputError: no such calculator, module or factory; it cannot be made, or it gives no forces.
    """
    if ":" in name:
        factory = _imported(name)
    else:
        known = calculator_names()
        if name.lower() not in known:
            raise InputError(
                f"there is no calculator {name!r}: give one of ASE's ({', '.join(known)}), or module:factory"
            )
        try:
            factory = ase_calculators.get_calculator_class(name.lower())
        except (ImportError, AttributeError) as error:
            raise InputError(f"the calculator {name} is not installed here ({error})") from error
    try:
        calculator = factory()
    except Exception as error:  # somebody else's code
        text = " ".join(str(error).split())[:300]
        raise InputError(
            f"the calculator {name} cannot be made without arguments ({type(error).__name__}: {text}): write "
            "a function that makes it, and give module:function"
        ) from error
    if not isinstance(calculator, BaseCalculator):
        raise InputError(f"{name} gives {type(calculator).__name__}, which is no calculator of ASE")
    if "forces" not in calculator.implemented_properties:
        raise InputError(f"the calculator {name} gives no forces, so it cannot relax a structure")
    return calculator


def calculator_names() -> list[str]:
    """Names of ASE's calculators, in small letters."""
    return sorted(ase_calculators.names)


class CalculatorError(InputError):
    """Failure of a calculator that is somebody else's code."""


@contextmanager
def calculator_errors(calculator: BaseCalculator, about: str, advice: str = "") -> Iterator[None]:
    """Turn what a calculator raises inside the context into `CalculatorError`, which names it.

    Args:
        calculator: somebody else's code, which raises what it likes; keep what is not its own outside.
        about: structure that it is asked about.
        advice: what to do instead.
    """
    added = f"; {advice}" if advice else ""
    try:
        yield
    except CalculatorError as error:  # of a context inside
        raise CalculatorError(f"{error}{added}") from error
    except (InputError, OSError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        name = type(calculator).__name__
        raise CalculatorError(f"{about}: {name} failed with {type(error).__name__}: {text}{added}") from error


def resolve_energy_kind(
    calculator: BaseCalculator, declared: str | None = None, default: str | None = None
) -> str:
    """Find the calculator's kind of energy: what it says itself, else the declared one, else the default.

    Raises:
        InputError: nothing says, they contradict each other, or the word is unknown.
    """
    # ASE's own calculators give total energies, unless they wrap another one.
    package, _, module = type(calculator).__module__.rpartition("ase.calculators.")
    is_plain = package == "" and bool(module) and module not in WRAPPERS
    own = getattr(calculator, "energy_kind", "total" if is_plain else None)
    for kind in (declared, own):
        if kind is not None and kind not in ENERGY_KINDS:
            raise InputError(f"the energy kind {kind!r} is unknown: use one of {', '.join(ENERGY_KINDS)}")
    if own is not None and declared is not None and own != declared:
        raise InputError(
            f"the calculator or checkpoint predicts {own} energies, not {declared} energies as declared: "
            "drop the declaration or use another one"
        )
    found = own or declared or default
    if found is None:
        raise InputError(
            "the calculator or checkpoint does not say whether it predicts adsorption or total energies: "
            'declare it with energy kind "adsorption" or "total"'
        )
    return found


def _imported(name: str) -> Callable[[], Any]:
    module_name, _, attribute = name.partition(":")
    before = list(sys.path)
    sys.path.append("")  # the working directory, behind everything that is installed
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # somebody else's code
        text = " ".join(str(error).split())[:300]
        raise InputError(
            f"the module of the calculator {name} cannot be imported ({type(error).__name__}: {text})"
        ) from error
    finally:
        sys.path[:] = before
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise InputError(f"the module {module_name} has no function or class {attribute}: check {name}")
    return found  # type: ignore[no-any-return]
