"""Effective medium theory that is interrupted, as by Ctrl-C."""

from ase.calculators.emt import EMT


def interrupted_emt(call: int) -> type[EMT]:
    """Make a calculator that stops once, at its calculation number `call`, counted over all that are made."""

    class Interrupted(EMT):
        calls = 0

        def calculate(self, *arguments: object, **more: object) -> None:
            type(self).calls += 1
            if type(self).calls == call:
                raise KeyboardInterrupt
            super().calculate(*arguments, **more)

    return Interrupted
