"""Exception for wrong data files."""


class DataError(ValueError):
    """A data file is wrong; the message is one sentence that names the file, the key and the remedy.

    Attributes:
        sid: id of the system whose record is wrong; None if unknown.
    """

    sid: str | None = None
