"""Make a file for the OC20 leaderboard from predictions on its four test sets, or check one.

    python scripts/make_submission.py --task s2ef --id id.npz --ood-ads ood_ads.npz --ood-cat ood_cat.npz \
        --ood-both ood_both.npz --out s2ef.npz
    python scripts/make_submission.py --task is2re --id runs/is2re/test_id ... --out is2re.npz
    python scripts/make_submission.py --validate s2ef.npz

S2EF takes the .npz of predict.py for each test set, IS2RE the folders of relax_is2re.py.
"""

import argparse
import sys
from pathlib import Path

from equiformer2.script import add_overwrite_argument, parse_checked, run_script


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--validate", type=Path, metavar="FILE", help="check this file and make none")
    parser.add_argument("--task", choices=("s2ef", "is2re"), help="needed to make a file")
    for split in ("id", "ood-ads", "ood-cat", "ood-both"):
        parser.add_argument(f"--{split}", type=Path, help=f"predictions of the test set {split}")
    parser.add_argument("--out", type=Path, help=".npz file to write")
    parser.add_argument(
        "--atoms",
        choices=("free", "all"),
        default="free",
        help="whose forces S2EF files hold (default: %(default)s; only free atoms are scored)",
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument(
        "--data-root",
        type=Path,
        help="also compare with the test sets in this folder: test_id, test_ood_ads, …",
    )
    add_overwrite_argument(parser)
    making = ("--id", "--ood-ads", "--ood-cat", "--ood-both", "--out", "--atoms", "--dtype")
    arguments = parse_checked(
        parser,
        excludes=[*((option, "--validate") for option in making), ("--atoms", "--task=is2re")],
    )
    if arguments.validate is None and (arguments.task is None or arguments.out is None):
        parser.error("give --task, the four predictions and --out, or --validate FILE")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    from datasets_oc20.catalogue import find_splits
    from equiformer2.errors import InputError
    from equiformer2.files import check_target
    from equiformer2.training.submission import SPLITS, make_submission, write_submission
    from equiformer2.training.submission_checks import problems_beside_data, submission_problems

    data = {}
    if arguments.data_root is not None:
        found = find_splits(arguments.data_root, [f"test_{split}" for split in SPLITS])
        data = dict(zip(SPLITS, found.values(), strict=True))
    file = arguments.validate
    if file is None:
        file = arguments.out
        if file.suffix != ".npz":
            raise InputError(f"{file}: the leaderboard takes .npz files, give this ending")
        given = {split: getattr(arguments, split) for split in SPLITS}
        predictions = {split: path for split, path in given.items() if path is not None}
        check_target(file, inputs=predictions.values(), overwrite=arguments.overwrite)
        write_submission(file, make_submission(arguments.task, predictions, arguments.atoms, arguments.dtype))
        print(f"{file}: {arguments.task} for {', '.join(SPLITS)}")
    problems = submission_problems(file, arguments.task)
    if data and not problems:
        problems = problems_beside_data(file, data)
    for problem in problems:
        print(f"error: {file}: {problem}", file=sys.stderr)
    if not problems:
        print(f"{file}: nothing wrong was found")
    return 2 if problems else 0


if __name__ == "__main__":
    run_script(main)
