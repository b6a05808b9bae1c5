"""Train EquiformerV2: `python scripts/train.py --config configs/….yaml`."""

import sys

from equiformer2.script import run_script


def main() -> None:
    # Imported here so that a wrong installation, too, is told in one line.
    from equiformer2.training.cli import parse
    from equiformer2.training.run import train

    folder = train(parse(sys.argv[1:]))
    print(f"done: {folder}")


if __name__ == "__main__":
    run_script(main)
