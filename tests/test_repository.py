"""What every file of the project keeps to: data is never run, files are short, nothing is machine-bound."""

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("equiformer2", "datasets_oc20", "scripts", "benchmarks", "studies")
MAX_LINES = 800
RUNS_WHAT_IT_READS = {"eval", "exec", "os.system", "pickle.load", "pickle.loads", "yaml.load"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def code_execution(source: str) -> list[str]:
    """`line: call` of each call that could run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (
            name in RUNS_WHAT_IT_READS
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or keywords.get("allow_pickle") == "True"
            or keywords.get("shell") == "True"
        ):
            found.append(f"{node.lineno}: {name}")
    return found


@pytest.mark.parametrize("folder", SHIPPED)
def test_no_file_becomes_a_program(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{call}"
        for path in sources(folder)
        for call in code_execution(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "dangerous"),
    [
        ("torch.load(p)", True),
        ("torch.load(p, weights_only=False)", True),
        ("torch.load(p, weights_only=True)", False),
        ("eval(x)", True),
        ("model.eval()", False),
        ("pickle.loads(b)", True),
        ("np.load(p)", False),
        ("np.load(p, allow_pickle=True)", True),
        ("subprocess.run(c, shell=True)", True),
    ],
)
def test_code_execution_is_recognised(source: str, dangerous: bool) -> None:
    assert bool(code_execution(source)) == dangerous


def test_files_stay_short() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(*SHIPPED, "tests")
    }
    assert not {name: count for name, count in lengths.items() if count > MAX_LINES}


def test_test_files_have_names_of_their_own() -> None:
    """`make test-slow` collects all folders at once, and pytest imports a file by its name alone."""
    names = Counter(path.name for path in sources("tests", "benchmarks", "studies"))
    assert not [name for name, count in names.items() if count > 1 and name.startswith("test_")]


def test_the_packages_are_no_heap_of_fragments() -> None:
    """At most 25 top-level functions and classes per 1,000 lines; nequip and e3nn have 15."""
    texts = [path.read_text(encoding="utf-8") for path in sources("equiformer2", "datasets_oc20")]
    lines = sum(len(text.splitlines()) for text in texts)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    definitions = sum(isinstance(node, kinds) for text in texts for node in ast.parse(text).body)
    assert definitions <= 0.025 * lines, f"{definitions} definitions in {lines} lines"


def test_docstrings_open_with_a_verb_or_a_noun() -> None:
    """At most 2 % open with a word that makes half a sentence of them."""
    openers = ("What", "Whether", "Of", "Those", "How", "Who", "Where", "Why", "Every way")
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    docstrings = {
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}": text
        for path in sources("equiformer2", "datasets_oc20")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, documented) and (text := ast.get_docstring(node))
    }
    wrong = [name for name, text in docstrings.items() if text.startswith(tuple(f"{o} " for o in openers))]
    assert len(wrong) <= 0.02 * len(docstrings), "\n".join(wrong)


def test_behaviour_is_observed_rather_than_replaced() -> None:
    """At most 40 `setattr` of monkeypatch in all tests."""
    count = sum(
        isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".setattr", "mock.patch"))
        for path in sources("tests", "benchmarks", "studies")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )
    assert count <= 40, f"{count} replaced attributes"


def test_the_quick_tests_exist() -> None:
    """Every line of quick.txt is a file, or `file::name` of a test or class in it with its parameters."""
    for line in (ROOT / "tests/quick.txt").read_text(encoding="utf-8").splitlines():
        file, *names = line.partition("[")[0].split("::")
        tree: ast.Module | ast.ClassDef = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for name in names:
            inside = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            assert name in inside, f"{line}: {file} has no {name}"
            if isinstance(inside[name], ast.ClassDef):
                tree = inside[name]


def test_nothing_is_bound_to_one_machine() -> None:
    # Home and absolute work folders, and index addresses: a fresh clone has none of them.
    pattern = re.compile(r"/(?:work|root|home)/\w|(?:extra-)?index-url|find-links|\.\./shared")
    texts = [
        path
        for folder in (*SHIPPED, "docs", "configs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".md", ".sh", ".txt", ".yaml", ".json"}
    ]
    texts += [
        ROOT / name for name in ("Makefile", "README.md", "pyproject.toml", "constraints.txt", ".ci/run")
    ]
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_constraints_pin_every_direct_dependency() -> None:
    def normalise(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["dev"], *extras["package"]]
    names = {normalise(re.match(r"[\w.-]+", requirement)[0]) for requirement in wanted} - {"equiformer2"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert names <= {normalise(name) for name in pins}
    # A local version (+cpu, +cu…) exists only on some machines.
    assert not [version for version in pins.values() if "+" in version]


def test_every_test_file_has_a_name_of_its_own() -> None:
    """The folders are no packages: of two files with one name pytest collects the first only."""
    names = [path.name for path in sources("tests") if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))
