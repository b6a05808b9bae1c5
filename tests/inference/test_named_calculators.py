"""ASE calculators by name or by the code that makes them."""

import sys
from pathlib import Path

import pytest
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import SumCalculator
from inference_helpers import KindedEMT

from equiformer2.errors import InputError
from equiformer2.inference.named_calculators import calculator_by_name, resolve_energy_kind

MODULE = """
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones

def make():
    return LennardJones(sigma=2.3, rc=6.0)

class Makers:
    emt = EMT

def nothing():
    return 3

def broken():
    raise RuntimeError("no licence\\n found")

class Blind(EMT):
    implemented_properties = ["energy"]

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "makes_calculators.py").write_text(MODULE)
    (tmp_path / "has_a_fault.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "makes_calculators", raising=False)
    return "makes_calculators"


def test_by_name_and_by_factory(module: str) -> None:
    before = list(sys.path)
    assert isinstance(calculator_by_name("emt"), EMT)
    assert isinstance(calculator_by_name("EMT"), EMT)
    assert isinstance(calculator_by_name("lj"), LennardJones)
    made = calculator_by_name(f"{module}:make")
    assert isinstance(made, LennardJones)
    assert made.parameters["sigma"] == 2.3
    assert isinstance(calculator_by_name(f"{module}:Makers.emt"), EMT)
    assert isinstance(calculator_by_name("ase.calculators.emt:EMT"), EMT)
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("dft", r"there is no calculator 'dft': give one of ASE's \(abinit, .*emt, .*vasp\), or module:fac"),
        ("", "there is no calculator ''"),
        ("kim", "cannot be made without arguments"),
        ("gpaw", "the calculator gpaw is not installed here"),
        ("makes_calculators:other", "the module makes_calculators has no function or class other"),
        ("makes_calculators:number", "has no function or class number"),
        ("makes_calculators:", "has no function or class"),
        ("makes_calculators:nothing", "gives int, which is no calculator of ASE"),
        ("makes_calculators:broken", r"cannot be made without arguments \(RuntimeError: no licence found\)"),
        ("makes_calculators:Blind", "gives no forces"),
        ("no_such_module:make", "cannot be imported .ModuleNotFoundError"),
        ("has_a_fault:make", "cannot be imported .*nothing_of_this_name"),
        (":make", "cannot be imported"),
        ("../module.py:make", "cannot be imported"),
    ],
)
def test_what_is_no_calculator_is_told_in_a_sentence(module: str, name: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as raised:
        calculator_by_name(name)
    assert "\n" not in str(raised.value)


def test_energies_are_total_unless_somebody_says_otherwise() -> None:
    assert resolve_energy_kind(EMT()) == "total"
    assert resolve_energy_kind(KindedEMT("adsorption"), default="total") == "adsorption"
    assert resolve_energy_kind(SumCalculator([EMT(), EMT()]), default="total") == "total"
    assert resolve_energy_kind(SumCalculator([EMT(), EMT()]), "adsorption", "total") == "adsorption"
    with pytest.raises(InputError, match="predicts adsorption energies, not total energies as declared"):
        resolve_energy_kind(KindedEMT("adsorption"), "total")
    with pytest.raises(InputError, match="the energy kind 'formation' is unknown"):
        resolve_energy_kind(KindedEMT("formation"))
