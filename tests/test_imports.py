"""Imports point one way (docs/architecture.md): each room may use only the rooms below it."""

import ast
from pathlib import Path

import pytest

import equiformer2

ROOT = Path(__file__).parents[1]

FOUNDATION = {"equiformer2.deprecation", "equiformer2.devices", "equiformer2.errors", "equiformer2.values"}
FOUNDATION |= {"equiformer2.batch_threads", "equiformer2.version"}
ROOT_MODULES = FOUNDATION | {"equiformer2.files", "equiformer2.script", "equiformer2.shipped"}
# The one place for reading what others wrote, with its exception.
UNTRUSTED = {"datasets_oc20.untrusted", "datasets_oc20.errors"}
GEOMETRY = FOUNDATION | {"equiformer2.graph", "equiformer2.kernels"}
NETWORK = GEOMETRY | {"equiformer2.model"}
FILES = NETWORK | ROOT_MODULES | {"equiformer2.checkpoint"}
ALLOWED = {
    "datasets_oc20": set(),
    "equiformer2/__init__.py": FOUNDATION
    | {"equiformer2.adsorption", "equiformer2.checkpoint", "equiformer2.inference", "equiformer2.model"},
    "equiformer2/__main__.py": {"equiformer2.cli"},
    "equiformer2/cli": {"datasets_oc20", "equiformer2"},
    "equiformer2/shipped": FOUNDATION,
    "equiformer2/batch_threads.py": set(),
    "equiformer2/deprecation.py": set(),
    "equiformer2/version.py": set(),
    "equiformer2/errors.py": set(),
    "equiformer2/values.py": {"equiformer2.errors"},
    "equiformer2/devices.py": {"equiformer2.errors"},
    "equiformer2/files.py": FOUNDATION | {"datasets_oc20"},
    "equiformer2/script.py": FOUNDATION | {"datasets_oc20"},
    "equiformer2/graph": FOUNDATION,
    "equiformer2/kernels": FOUNDATION,
    "equiformer2/model": GEOMETRY,
    "equiformer2/symmetry": FOUNDATION,
    "equiformer2/checkpoint": NETWORK | ROOT_MODULES | UNTRUSTED,
    "equiformer2/adapters": FILES,
    "equiformer2/experts": FILES | {"datasets_oc20"},
    "equiformer2/inference": FILES | {"datasets_oc20"},
    "equiformer2/report": FILES | {"datasets_oc20", "equiformer2.inference"},
    "equiformer2/adsorption": FILES | {"datasets_oc20", "equiformer2.inference", "equiformer2.report"},
    "equiformer2/pruning": FILES
    | {"datasets_oc20", "equiformer2.adapters", "equiformer2.inference", "equiformer2.symmetry"}
    | {"equiformer2.training"},
    "equiformer2/training": FILES | {"datasets_oc20", "equiformer2.adapters", "equiformer2.experts"},
    "equiformer2/finetuning": FILES
    | {"datasets_oc20", "equiformer2.adapters", "equiformer2.inference", "equiformer2.training"},
    "equiformer2/demo": FILES
    | {"datasets_oc20", "equiformer2.adsorption", "equiformer2.inference", "equiformer2.pruning"}
    | {"equiformer2.report", "equiformer2.training"},
}
# These measure what users get, so they go through the predictor; nothing else in training may.
EXCEPTIONS = {
    f"equiformer2/training/{name}.py": {"equiformer2.inference"}
    for name in ("evaluation", "learning_curve", "relaxation_run")
}

# The network is pure torch: importable where none of these is installed.
NOT_IN_THE_NETWORK = {
    "ase",
    "jsonargparse",
    "lightning",
    "lmdb",
    "matplotlib",
    "omegaconf",
    "pytorch_lightning",
    "torchmetrics",
    "wandb",
    "yaml",
}
PURE_TORCH = ("equiformer2/kernels", "equiformer2/model", "equiformer2/symmetry")


def imported_modules(path: Path, root: Path = ROOT) -> list[tuple[int, str]]:
    """`(line, absolute dotted name)` of each import in a file, those inside functions too."""
    package = list(path.relative_to(root).parts[:-1]) if path.is_relative_to(root) else []
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            # `from equiformer2 import model` names the room in the alias, not in the module.
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def python_files(folder: str) -> list[Path]:
    path = ROOT / folder
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


@pytest.mark.parametrize("room", ALLOWED)
def test_room_imports_only_rooms_below(room: str) -> None:
    files = python_files(room)
    assert files, f"{room} does not exist"
    own = {room.removesuffix(".py").replace("/", ".")}
    wrong = []
    for path in files:
        allowed = ALLOWED[room] | own | EXCEPTIONS.get(path.relative_to(ROOT).as_posix(), set())
        wrong += [
            f"{path.relative_to(ROOT)}:{line} imports {name}"
            for line, name in imported_modules(path)
            if within(name, {"equiformer2", "datasets_oc20", "scripts", "tests"})
            and not within(name, allowed)
        ]
    assert not wrong, "\n".join(wrong)


def import_circles(files: dict[str, Path]) -> list[list[str]]:
    """Strongly connected groups of modules; imports inside functions and for type checkers count.

    A package stands for its own `__init__`, not for the modules in it.
    """
    edges: dict[str, set[str]] = {}
    for name, path in files.items():
        targets = {target for _, target in imported_modules(path)}
        # The last part may be a name inside the module.
        edges[name] = {t if t in files else t.rpartition(".")[0] for t in targets} & files.keys() - {name}

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            waiting += edges[waiting.pop()] - seen
            seen |= set(waiting)
        return seen

    reachable = {name: reached(name) for name in files}
    groups = {
        tuple(sorted(other for other in reachable[name] if name in reachable[other]))
        for name in files
        if name in reachable[name]
    }
    return [list(group) for group in sorted(groups)]


def modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("equiformer2", "datasets_oc20")
        for path in python_files(package)
    }


def test_imports_have_no_circles() -> None:
    assert not import_circles(modules())


def test_a_circle_is_found(tmp_path: Path) -> None:
    texts = {"a": "from b import x", "b": "def f():\n    import c", "c": "import a", "d": "import a"}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    files = {name: tmp_path / f"{name}.py" for name in texts}
    assert import_circles(files) == [["a", "b", "c"]]


def test_modules_import_from_modules_rather_than_from_the_package() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for name_of, path in modules().items()
        for line, name in imported_modules(path)
        if name_of != "equiformer2" and name.rpartition(".")[0] == "equiformer2" and name not in modules()
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_its_arrows() -> None:
    rooms = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "equiformer2").iterdir()
        if (path.is_dir() and path.name != "__pycache__") or path.suffix == ".py"
    }
    assert rooms <= set(ALLOWED)


def test_nothing_imports_from_the_package_itself() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for folder in ("equiformer2", "datasets_oc20")
        for path in python_files(folder)
        for line, name in imported_modules(path)
        if name == "equiformer2" or name.removeprefix("equiformer2.") in equiformer2.__all__
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", PURE_TORCH)
def test_the_network_is_pure_torch(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in python_files(room)
        for line, name in imported_modules(path)
        if name.split(".")[0] in NOT_IN_THE_NETWORK
    ]
    assert not wrong, "\n".join(wrong)


def test_the_package_never_imports_what_is_not_installed() -> None:
    own_scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for folder in ("equiformer2", "datasets_oc20")
        for path in python_files(folder)
        for line, name in imported_modules(path)
        if name.split(".")[0] in own_scripts | {"benchmarks", "scripts", "studies", "tests"}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("folder", "other"), [("benchmarks", "studies"), ("studies", "benchmarks")])
def test_benchmarks_and_studies_import_the_package_alone(folder: str, other: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in python_files(folder)
        if "tests" not in path.parts
        for line, name in imported_modules(path)
        if name.split(".")[0] in {other, "scripts", "tests"}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["benchmarks", "studies"])
def test_modules_of_benchmarks_and_studies_form_no_circle(folder: str) -> None:
    names = {f"{folder}.{path.stem}": path for path in (ROOT / folder).glob("*.py")}
    imports = {
        name: {
            other
            for _, imported in imported_modules(path)
            for other in names
            if imported == other or imported.startswith(f"{other}.")
        }
        for name, path in names.items()
    }
    while leaves := {name for name, needed in imports.items() if not needed}:
        imports = {name: needed - leaves for name, needed in imports.items() if name not in leaves}
    assert not imports, f"these import each other: {sorted(imports)}"


def test_relative_and_aliased_imports_are_seen(tmp_path: Path) -> None:
    room = tmp_path / "equiformer2" / "model"
    room.mkdir(parents=True)
    source = room / "x.py"
    source.write_text(
        "from ..training import task\nfrom equiformer2 import inference\ndef f():\n    import lmdb\n"
    )
    names = [name for _, name in imported_modules(source, root=tmp_path)]
    assert names == ["equiformer2.training.task", "equiformer2.inference", "lmdb"]
