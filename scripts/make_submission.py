"""Make or check a leaderboard file: the command `equiformer2 submission`."""

from equiformer2.cli.main import script

if __name__ == "__main__":
    script("submission")
