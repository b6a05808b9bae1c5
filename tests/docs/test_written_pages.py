"""Pages in docs/results are what commands of the package write from the results files beside them."""

import runpy

from figures import content_of
from pages import ROOT

from equiformer2.training.learning_curve import SystemErrors, Validation, markdown


def test_page_of_the_small_network_is_what_the_results_say() -> None:
    data = content_of(ROOT / "docs/results/oc20_small.json")
    runs = {name: [Validation(**one) for one in validations] for name, validations in data["runs"].items()}
    systems = {
        name: {sid: SystemErrors(**one) for sid, one in errors.items()}
        for name, errors in data["systems"].items()
    }
    page = (ROOT / "docs/results/oc20_small.md").read_text(encoding="utf-8")
    assert markdown(runs, systems, "oc20_small.png").strip() in page


def test_picture_is_what_its_script_draws() -> None:
    folder = ROOT / "docs/figures"
    drawn = runpy.run_path(str(folder / "draw_workflow.py"))["draw"]()
    assert (folder / "workflow.svg").read_text(encoding="utf-8") == drawn
