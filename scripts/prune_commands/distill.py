"""Train a pruned network on the energies and forces of the dense one; needs no labels.

Further settings of train.py stand after --, as in -- --trainer.max_epochs=5. An interrupted call with the
same --out is continued.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--student", required=True, help="checkpoint of the pruned network")
    parser.add_argument("--teacher", required=True, help="checkpoint of the dense network")
    parser.add_argument("--data", required=True, nargs="+", help="structures to learn on")
    parser.add_argument("--val", required=True, nargs="+", help="structures to validate on, of other systems")
    parser.add_argument("--out", required=True, type=Path, help="output folder")
    parser.add_argument(
        "--config", action="append", default=[], help="of train.py, such as configs/pruning/distill.yaml"
    )
    parser.add_argument("--from-scratch", action="store_true", help="from random weights: the baseline")
    parser.add_argument("--device", default="cpu", help="of the teacher (default: cpu)")
    parser.add_argument("settings", nargs="*", help="settings of train.py, after --")


def run(options: argparse.Namespace) -> None:
    from equiformer2.files import check_target
    from equiformer2.pruning.recovery.distillation import distill

    settings = [text for path in options.config for text in ("--config", path)] + options.settings
    given = [options.student, options.teacher, *options.data, *options.val, *options.config]
    for name in ("train.lmdb", "val.lmdb", "run/checkpoints/best.pt", "run/checkpoints/last.pt"):
        check_target(options.out / name, inputs=given)
    folder = distill(
        options.student,
        options.teacher,
        options.data,
        options.val,
        options.out,
        settings,
        from_scratch=options.from_scratch,
        device=options.device,
    )
    print(f"wrote {folder / 'checkpoints' / 'best.pt'} and last.pt")
