"""The documentation does not rot: links resolve, and the commands it shows exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def heading_anchors(text: str) -> set[str]:
    """The anchors GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (
            anchor
            and target.suffix == ".md"
            and anchor not in heading_anchors(target.read_text(encoding="utf-8"))
        ):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    assert not broken_links(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(
        re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    commands = re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, flags=re.MULTILINE)
    assert not set(commands) - targets
    files = re.findall(r"\b((?:scripts|benchmarks|studies|configs)/[\w/.-]+\.(?:py|ya?ml|sh))\b", text)
    assert not [name for name in files if not (ROOT / name).exists()]


def named_on_an_index(text: str) -> list[str]:
    """Requirements by the project's name, which on a public index is nobody's or a stranger's.

    `pip install .` and `'.[extra]'` name the checkout.
    """
    name = r"equiformer2"
    extras = re.findall(rf"{name}\[[\w, -]+\]", text)
    installed = re.findall(
        rf"(?:pip3?|uv|pipx)\s+(?:add|download|install)\b[^\n`]*?[ \t'\"]({name}(?:[=<>~!]\S*)?)(?![\w./[-])",
        text,
    )
    return extras + installed


def test_nothing_installs_the_project_from_an_index() -> None:
    # The project does not own its name there: whoever registers it would be installed.
    folders = ("equiformer2", "datasets_oc20", "scripts", "benchmarks", "studies", "tests")
    folders += ("docs", "configs", "data", "models", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [
        ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml")
    ]
    found = [
        f"{path.relative_to(ROOT)}: {requirement}"
        for path in files
        if path != Path(__file__)
        and path.is_file()
        and (path.suffix in {".py", ".md", ".sh", ".toml", ".yaml"} or path.name in {"Makefile", "run"})
        for requirement in named_on_an_index(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pip install 'equiformer2[wandb]'", True),
        ('test = ["pytest", "equiformer2[ase-lmdb,triton]"]', True),
        ("pip install equiformer2", True),
        ("python -m pip install --upgrade equiformer2", True),
        ("pip install 'equiformer2==0.1'", True),
        ("uv add equiformer2", True),
        ("pip install .", False),
        ("pip install '.[wandb]'", False),
        ("pip install ./equiformer2", False),
        ("pip install .\nequiformer2 doctor", False),
        ("pip install torch  # for equiformer2/kernels", False),
    ],
)
def test_requirements_by_the_project_s_name_are_found(text: str, found: bool) -> None:
    assert bool(named_on_an_index(text)) == found


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](#a-heading) [b](missing.md) [c](#nowhere) [d](https://example.org)\n")
    assert broken_links(page) == ["missing.md", "#nowhere"]
