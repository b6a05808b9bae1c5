"""Time and weigh equiformer2 against fairchem-core: `benchmarks/compare_fairchem.py` under its old path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` is a package of the clone, never installed

from benchmarks.compare_fairchem import main
from equiformer2.script import run_script

if __name__ == "__main__":
    run_script(main)
