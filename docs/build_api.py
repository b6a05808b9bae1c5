"""Build the API reference from docstrings: `python docs/build_api.py FOLDER` (needs the extra `docs`)."""

import sys
import warnings
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pdoc

#: Modules that nobody imports: what the console command and the demonstration are made of.
LEFT_OUT = ("equiformer2.cli", "equiformer2.demo", "equiformer2.shipped")


def modules() -> list[str]:
    """Names of all public modules, packages first."""
    names = []
    for root in ("equiformer2", "datasets_oc20"):
        names.append(root)
        package = import_module(root)
        names += [module.name for module in walk_packages(package.__path__, f"{root}.")]
    public = [name for name in names if not any(part.startswith("_") for part in name.split("."))]
    return [name for name in public if not name.startswith(LEFT_OUT)]


def main(folder: str) -> None:
    """Write the reference into `folder`."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    for root in ("equiformer2", "datasets_oc20"):
        package = import_module(root)
        for name in package.__all__:  # some are imported on first use, where pdoc does not find them
            setattr(package, name, getattr(package, name))
    warnings.filterwarnings("ignore", category=UserWarning, module="pdoc")  # annotations under TYPE_CHECKING
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*modules(), output_directory=Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
