"""The console command `equiformer2`: one class per subcommand, read by `equiformer2.cli.main`.

A command is a subclass of `equiformer2.cli.command.Command` in a file of this folder, named in the table
`COMMANDS` of `equiformer2.cli.main` as `"words of the command": "file:Class"`::

    class Doctor(Command):
        \"\"\"Check this installation and print a remedy for each problem.

        The first line is shown in the list of commands, the whole text by `equiformer2 doctor --help`.
        \"\"\"

        def add_arguments(self, parser: Parser) -> None:
            add_device_argument(parser)  # groups shared by commands: equiformer2.cli.options
            parser.add_argument("--rounds", type=int, default=3, help="number of timed calls (default: 3)")

        def run(self, options: argparse.Namespace) -> Result:
            from equiformer2.kernels import ...  # torch and all that needs it is imported here

            print("what a person reads")
            return Result({"ok": True, "checks": []}, status=0)

Rules:

- Files of this folder import neither torch nor anything that imports it at their top: `equiformer2 --help`
  and shell completion read all of them.
- Options have dashes; `Parser` accepts the older spelling with underscores and warns once. Every help text
  names the thing and its unit.
- `--json` and `--debug` belong to every command and are added by `main`. With `--json` what `run` prints goes
  to standard error, and `Result.record` becomes the one JSON document on standard output, with `schema`,
  `command`, `commit`, `checkpoint_sha256` and `seconds` in front (`equiformer2.script.header`) unless it has
  them already, as the record of a JSON file has.
- Statuses: 0 done, 1 a bug, 2 bad input or arguments, 3 finished but not converged or a limit missed. `run`
  raises `InputError` or `DataError` for bad input and returns 0 or 3 in its `Result`.
"""
