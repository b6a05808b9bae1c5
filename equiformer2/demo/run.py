"""The demo from raw files to report."""

import time
from pathlib import Path
from typing import Any

from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.record import adsorption_report, write_adsorption_record
from equiformer2.demo import steps
from equiformer2.demo.background import wait_for
from equiformer2.demo.demo_report import DemoReport, table_lines
from equiformer2.demo.plan import CHECKPOINT, PRUNING_PLAN, RELAXED_SYSTEMS, UNSEEN_SYSTEMS, DemoPlan
from equiformer2.demo.steps import Network, Relaxed
from equiformer2.errors import InputError
from equiformer2.files import write_bytes, write_json
from equiformer2.inference import Predictor
from equiformer2.inference.record import model_record
from equiformer2.pruning import PruningPlan
from equiformer2.pruning.structured.plan_request import apply_plan
from equiformer2.script import header
from equiformer2.training.evaluation import draw_figures

SHIPPED, TUNED, SCRATCH, PRUNED = "as shipped", "fine-tuned", "from nothing", "pruned"


def run_demo(root: AnyPath, out: AnyPath, plan: DemoPlan) -> Path:
    """Preprocess, fine-tune, evaluate, relax, prune, report.

    Args:
        root: checkout of the project, with `data/`, `configs/` and `models/`.
        out: a folder that does not exist yet.
        plan: sizes.

    Returns:
        Path of the report.

    Raises:
        InputError: `out` exists, bundled data are missing, or a training failed.
    """
    root, out = Path(root), Path(out)
    raw, start = root / "data", root / CHECKPOINT
    if out.exists():
        raise InputError(f"{out} exists already: give another folder with --out, or remove it")
    for needed in (raw / "oc20_trajs", raw / "teacher_large" / "test", start, root / PRUNING_PLAN):
        if not needed.exists():
            raise InputError(f"{needed} is missing: run the demo in a checkout of the project")
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def done(name: str) -> None:
        nonlocal clock
        seconds[name], clock = time.perf_counter() - clock, time.perf_counter()

    print("1/6 raw OC20 relaxations to LMDB", flush=True)
    data = steps.prepare(raw, out / "data", plan)
    done("preprocessing")
    print(
        f"2/6 {plan.training_time} s of fine-tuning {CHECKPOINT} on DFT frames, and beside it as long from "
        "random weights",
        flush=True,
    )
    runs = steps.train_both(root / "configs" / "demo.yaml", start, data, out, plan)
    done("training")
    print("3/6 errors on systems that no training has seen", flush=True)
    tuned_file, scratch_file = (run / "checkpoints" / "last.pt" for run in runs)
    shipped = steps.judge(SHIPPED, start, data)
    tuned = steps.judge(TUNED, tuned_file, data)
    scratch = steps.judge(SCRATCH, scratch_file, data)
    done("evaluation")
    print("4/6 relaxing adsorbates, and beside it distilling the pruned network", flush=True)
    small_file = out / "pruned.pt"
    before, after = apply_plan(tuned_file, PruningPlan.load(root / PRUNING_PLAN), small_file)
    print(f"the pruning plan leaves {after:,} of {before:,} parameters", flush=True)
    config = root / "configs" / "pruning" / "distill.yaml"
    with steps.distillation(small_file, tuned_file, config, data, out / "distilled", plan) as distilling:
        relaxed = steps.relax_teacher_systems(shipped, raw, out / "relaxations", plan)
        relaxed += steps.relax_unseen(
            shipped, raw, out / "relaxations_shipped", plan, RELAXED_SYSTEMS[:1], imitates="teacher"
        )
        relaxed += steps.relax_unseen(tuned, raw, out / "relaxations", plan)
        wait_for([distilling], "distillation", plan.distillation_time + 30)
    done("relaxations and distillation")
    print("5/6 the pruned network beside the dense one", flush=True)
    cut = steps.judge(f"{PRUNED}, not distilled", small_file, data)
    pruned = steps.judge(PRUNED, out / "distilled" / "run" / "checkpoints" / "last.pt", data)
    relaxed += steps.relax_unseen(pruned, raw, out / "relaxations_pruned", plan, RELAXED_SYSTEMS[:1])
    tuned, pruned = steps.timed(tuned, pruned, raw, plan.timed_calls)
    done("the pruned network")
    print("6/6 report", flush=True)
    networks = [shipped, scratch, tuned, cut, pruned]
    print("\n".join(table_lines(networks)), flush=True)
    name = RELAXED_SYSTEMS[0]
    shown = next(item for item in relaxed if item.system == name and item.network == TUNED)
    folder = out / "relaxations" / name
    predictor = Predictor(tuned_file)
    record = model_record(predictor, tuned_file)
    write_adsorption_record(folder, shown.result, record, predictor.checkpoint.provenance)
    print(adsorption_report(shown.result))
    print(f"DFT's own relaxation ends at {shown.dft:.3f} eV.", flush=True)
    parity = draw_figures(out / "figures", {"fine-tuned": tuned.result, "pruned": pruned.result})
    figures = {
        f"{name}: start and relaxed structure": folder / "structure.png",
        f"{name}: relaxation with the fine-tuned network": folder / "relaxation.png",
        "Fine-tuning": runs[0] / "figures" / "loss.png",
        "Training from nothing": runs[1] / "figures" / "loss.png",
    } | {path.stem.replace("_", " "): path for path in parity}
    write_json(
        out / "results.json",
        {
            **header("demo/2", tuned_file),
            "unseen_systems": UNSEEN_SYSTEMS,
            "networks": [_network_record(network) for network in networks],
            "relaxations": [_relaxation_record(item) for item in relaxed],
            "seconds_per_step": seconds,
        },
    )
    report = DemoReport(plan, networks, relaxed, shown, figures, seconds)
    return write_bytes(out / "report.html", report.to_html().encode())


def _network_record(network: Network) -> dict[str, Any]:
    is_timed = network.milliseconds == network.milliseconds
    return {
        "name": network.title,
        "checkpoint": str(network.checkpoint),
        "steps": network.steps,
        "parameters": network.parameters,
        "macs": network.macs if is_timed else None,
        "force_call_ms": network.milliseconds if is_timed else None,
        **network.result.to_dict(),
    }


def _relaxation_record(item: Relaxed) -> dict[str, Any]:
    return {
        "sid": item.system,
        "network": item.network,
        "dft_relaxed_eV": item.dft,
        "teacher_relaxed_eV": item.teacher,
        "start_eV": item.start,
        **item.result.summary(),
    }
