"""The one exception for wrong input."""


class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence that names it and says what to do."""
