"""The whole pruning study: what every method costs in accuracy and saves in time, on trained networks.

    python -m studies.pruning --config configs/pruning/study.yaml

Parts: `lossless` (what inference leaves out anyway), `studies` (methods, budgets, seeds; routers, cuts,
distillation; `jobs` of them at a time), `speed` (force calls through the ASE calculator), `report`
(docs/results/pruning_study.*). With configs/pruning/study_teacher.yaml the report takes in the pages of
`studies.precision`, `studies.adapters` and `studies.experts`; `--parts pages` renews these alone, in a report
that is there.
Results that are there are not computed again: a call that was stopped goes on. Time `lossless` and `speed`
when the machine does nothing else.
"""

import argparse
from pathlib import Path

from equiformer2.errors import InputError
from equiformer2.script import run_script

PARTS = ("lossless", "studies", "speed", "report")
PAGES = "pages"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/pruning/study.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/pruning_study"), help="folder of all results")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the report")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--studies", help="names of the studies to run (default: all in the file)")
    options = parser.parse_args()

    from studies.campaign import read_campaign
    from studies.stopwatch import Stopwatch

    campaign = read_campaign(options.config)
    parts = _names("parts", options.parts, (*PARTS, PAGES))
    names = _names("studies", options.studies or ",".join(campaign.studies), tuple(campaign.studies))
    watch = Stopwatch(options.out)
    if "lossless" in parts:
        from studies.force_call_times import measure_lossless

        with watch.part("lossless"):
            measure_lossless(campaign, options.out / "lossless")
    if "studies" in parts:
        from studies.parallel_studies import run_studies
        from studies.timed_study import TIMED

        with watch.part("plans for time"):
            # Alone, before the others begin: what they choose by is measured.
            for name in names:
                if TIMED in campaign.studies[name].methods:
                    campaign.study(name, options.out).search_for_time()
        with watch.part("studies"):
            run_studies(campaign, options.config, names, options.out)
    if "speed" in parts:
        from studies.force_call_times import measure_calls

        with watch.part("speed"):
            measure_calls(campaign, options.out, options.out / "speed")
    if "report" in parts:
        from studies.study_report import write_study

        for path in write_study(campaign, options.out, options.results):
            print(f"wrote {path}")
    if PAGES in parts:
        from studies.study_report import renew_other_methods

        print(f"wrote {renew_other_methods(campaign, options.results)}")


def _names(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise InputError(f"--{option} {name}: known are {', '.join(known)}")
    return names


if __name__ == "__main__":
    run_script(main)
