"""Write how a run's validation errors fell, and its checkpoint's errors system by system."""

import argparse
from dataclasses import asdict
from pathlib import Path

from equiformer2.script import origin, run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", required=True, nargs="+", type=Path, help="run folders of train.py, in order"
    )
    parser.add_argument("--checkpoint", required=True, help="whose errors by system are listed")
    parser.add_argument("--data", required=True, nargs="+", help="LMDB files to evaluate it on")
    parser.add_argument(
        "--out", required=True, type=Path, help="path without ending for the .md, .json and .png"
    )
    arguments = parser.parse_args()
    from equiformer2.files import write_bytes, write_json
    from equiformer2.inference import Predictor
    from equiformer2.training.evaluation import open_dataset
    from equiformer2.training.learning_curve import (
        draw_learning_curve,
        errors_by_system,
        markdown,
        read_validations,
    )

    predictor = Predictor(arguments.checkpoint)
    runs = {run.name: read_validations(run) for run in arguments.runs}
    systems = {
        Path(path).stem: errors_by_system(predictor, open_dataset(path, predictor, None))
        for path in arguments.data
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    first = next(iter(systems.values()))
    frames = sum(item.frames for item in first.values())
    zero = sum(item.zero_force_mae * item.frames for item in first.values()) / frames
    draw_learning_curve(runs, zero, arguments.out.with_suffix(".png"))
    record = {
        **origin(),
        "runs": {name: [asdict(v) for v in validations] for name, validations in runs.items()},
        "systems": {
            data: {sid: asdict(item) for sid, item in found.items()} for data, found in systems.items()
        },
    }
    write_json(arguments.out.with_suffix(".json"), record)
    text = markdown(runs, systems, f"{arguments.out.name}.png")
    write_bytes(arguments.out.with_suffix(".md"), text.encode())
    print(text)


if __name__ == "__main__":
    run_script(main)
