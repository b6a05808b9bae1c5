"""The demo from raw files to report."""

import time
from pathlib import Path

from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.record import adsorption_report, write_adsorption_record
from equiformer2.demo import steps
from equiformer2.demo.demo_report import DemoReport, error_lines
from equiformer2.demo.plan import RELAXED_SYSTEM, UNSEEN_SYSTEMS, DemoPlan
from equiformer2.errors import InputError
from equiformer2.files import write_bytes, write_json
from equiformer2.inference import Predictor
from equiformer2.inference.record import model_record
from equiformer2.script import header
from equiformer2.training.evaluation import draw_figures


def run_demo(root: AnyPath, out: AnyPath, plan: DemoPlan) -> Path:
    """Preprocess, train, evaluate, relax, report; returns the report's path.

    Args:
        root: checkout of the project, with `data/` and `configs/`.
        out: a folder that does not exist yet.
        plan: sizes.

    Raises:
        InputError: `out` exists, or the bundled data are missing.
    """
    root, out = Path(root), Path(out)
    raw = root / "data"
    if out.exists():
        raise InputError(f"{out} exists already: give another folder with --out, or remove it")
    if not (raw / "oc20_trajs").is_dir():
        raise InputError(f"{raw / 'oc20_trajs'} is missing: run the demo in a checkout of the project")
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def done(name: str) -> None:
        nonlocal clock
        seconds[name], clock = time.perf_counter() - clock, time.perf_counter()

    print("1/5 raw relaxations to LMDB", flush=True)
    data = steps.prepare(raw, out / "data", plan)
    done("preprocessing")
    print(
        f"2/5 training: {plan.teacher_time} s on teacher labels, {plan.dft_time} s on DFT frames", flush=True
    )
    first, second = steps.train_model(root / "configs" / "demo.yaml", data, out, plan)
    done("training")
    print("3/5 evaluating", flush=True)
    checkpoint = second / "checkpoints" / "last.pt"
    predictor = Predictor(checkpoint)
    judged = steps.judge(predictor, data)
    print("\n".join(error_lines(judged)), flush=True)
    draw_figures(
        out / "figures",
        {name.split(" of ")[0].replace(" ", "_"): item.result for name, item in judged.items()},
    )
    done("evaluation")
    print(
        "4/5 relaxing adsorbates with the trained model, on one slab of the training data and on unseen ones",
        flush=True,
    )
    systems = (RELAXED_SYSTEM, *UNSEEN_SYSTEMS)
    relaxed = steps.relax_with_model(predictor, raw, out / "relaxations", plan, systems)
    shown = out / "relaxations" / relaxed[0].system
    write_adsorption_record(shown, relaxed[0].result, model_record(predictor, checkpoint))
    print(adsorption_report(relaxed[0].result))
    print(f"DFT's own relaxation ends at {relaxed[0].dft_relaxed:.3f} eV.", flush=True)
    open_ended = [item.system for item in relaxed if not item.result.converged]
    if open_ended:
        print(
            f"{len(open_ended)} of {len(relaxed)} relaxations did not converge in {plan.relaxation_steps} "
            f"steps ({', '.join(open_ended)}): so little training does not always reach the threshold.",
            flush=True,
        )
    done("relaxations")
    print("5/5 report", flush=True)
    figures = {
        "Start and relaxed structure": shown / "structure.png",
        "Relaxation with the trained model": shown / "relaxation.png",
        "Training on teacher labels (not DFT)": first / "figures" / "loss.png",
        "Training on DFT frames": second / "figures" / "loss.png",
    }
    figures |= {path.stem.replace("_", " "): path for path in sorted((out / "figures").glob("*.png"))}
    write_json(
        out / "results.json",
        {
            **header("demo/1", checkpoint),
            "errors": {
                name: {
                    **item.result.to_dict(),
                    "training_mean_energy_mae": item.mean_energy,
                    "system_training_mean_energy_mae": item.system_mean,
                }
                for name, item in judged.items()
            },
            "relaxations": [
                {
                    "sid": item.system,
                    "seen": item.seen,
                    "dft_relaxed_eV": item.dft_relaxed,
                    **item.result.summary(),
                }
                for item in relaxed
            ],
            "seconds_per_step": seconds,
        },
    )
    report = DemoReport(plan, judged, relaxed, figures, seconds)
    return write_bytes(out / "report.html", report.to_html().encode())
