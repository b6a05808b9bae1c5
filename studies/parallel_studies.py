"""Several studies at the same time, each in a process of its own with its share of the cores.

Networks of this size leave a second thread half idle, and two studies do not wait for each other.
"""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from tqdm import tqdm

from equiformer2.errors import InputError
from equiformer2.pruning.analysis.pareto import planned_results
from equiformer2.script import run_script, show_log
from studies.campaign import Campaign, read_campaign

_LOG = "study.log"
_THREADS = "OMP_NUM_THREADS"
_LOOK = 1.0  # s between two looks at what is done


def run_studies(campaign: Campaign, config: Path, names: Sequence[str], out: Path) -> None:
    """Compute what is missing of the studies `names`, `campaign.jobs` of them at a time.

    The output of each goes to `study.log` in its folder. When one fails, or this call is stopped, all stop;
    the same call goes on. Studies that share a search are not computed at the same time.

    Args:
        campaign: the content of `config`.
        config: read again by every process.
        names: in the sequence in which they begin.
        out: folder of all results.

    Raises:
        InputError: a study failed; its log is named.
    """
    waiting, running = list(names), dict[str, BaseProcess]()
    # Threads are created by libraries as they are loaded, so the number is given to a process that begins.
    threads = max(1, torch.get_num_threads() // campaign.jobs)
    context = multiprocessing.get_context("spawn")
    with _bar(campaign, names, out) as bar, _threads_of_processes(threads):
        try:
            while waiting or running:
                while len(running) < campaign.jobs and (name := _next(campaign, waiting, running)):
                    waiting.remove(name)
                    running[name] = context.Process(target=_one_study, args=(config, name, out), name=name)
                    running[name].start()
                time.sleep(_LOOK)
                bar.n = _done(campaign, names, out)
                bar.set_postfix_str(", ".join(running), refresh=True)
                for name in [name for name, process in running.items() if not process.is_alive()]:
                    _check(name, running.pop(name), out)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.join()


def _next(campaign: Campaign, waiting: Sequence[str], running: Iterable[str]) -> str | None:
    """The first that can begin beside those that run."""
    busy = set[tuple[str, str]]().union(*(_searches(campaign, name) for name in running))
    return next((name for name in waiting if not _searches(campaign, name) & busy), None)


def _searches(campaign: Campaign, name: str) -> set[tuple[str, str]]:
    """Network and method: studies keep the state of a search in one place (`Study.searches`)."""
    part = campaign.studies[name]
    return {(part.model, method) for method in part.methods}


def _one_study(config: Path, name: str, out: Path) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = out / name / _LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    show_log()
    run_script(lambda: _run(config, name, out))


def _run(config: Path, name: str, out: Path) -> None:
    from equiformer2.pruning.analysis.pareto_report import write_report

    study = read_campaign(config).study(name, out)
    write_report(study.run(), out / name)


def _end_with_parent() -> None:
    """A study whose caller was killed must not write beside the call that continues it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _check(name: str, process: BaseProcess, out: Path) -> None:
    if process.exitcode == 0:
        return
    log = out / name / _LOG
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    told = [line for line in lines if line.strip()][-1:] or ["nothing was printed"]
    raise InputError(f"the study {name} ended with status {process.exitcode}, see {log}: {told[0]}")


def _done(campaign: Campaign, names: Sequence[str], out: Path) -> int:
    return sum(
        (out / name / "results" / f"{result}.json").exists()
        for name in names
        for result in planned_results(campaign.settings(name), campaign.trains_from_scratch(name))
    )


@contextmanager
def _bar(campaign: Campaign, names: Sequence[str], out: Path) -> Iterator["tqdm[None]"]:
    planned = (planned_results(campaign.settings(n), campaign.trains_from_scratch(n)) for n in names)
    total, done = sum(map(len, planned)), _done(campaign, names, out)
    with tqdm(total=total, initial=done, desc="studies", unit="results", file=sys.stderr) as bar:
        yield bar


@contextmanager
def _threads_of_processes(number: int) -> Iterator[None]:
    """Context in which processes begin with this number of threads."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before
