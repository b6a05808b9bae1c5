"""Run the console command as `python -m equiformer2`."""

import sys

from equiformer2.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
