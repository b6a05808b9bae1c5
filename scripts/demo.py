"""Run the demo on bundled data: the command `equiformer2 demo`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("demo")
