"""The one exception for wrong data files."""


class DataError(ValueError):
    """A data file is wrong; the message is one sentence that names the file and key and says what to do.

    Attributes:
        sid: of the system whose record is wrong, where the record tells it, else None.
    """

    sid: str | None = None
