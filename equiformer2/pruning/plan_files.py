"""JSON text and files of plans; what is read is checked before anything is made of it."""

from __future__ import annotations

import difflib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from datasets_oc20.untrusted import load_json, read_text
from equiformer2.errors import InputError
from equiformer2.files import as_input_error, write_json
from equiformer2.values import shown

_MOST_BYTES = 16 << 20


class PlanFile(ABC):
    """A plan that can be written as JSON.

    Attributes:
        kind: its name for people, such as `pruning plan`.
        file_format: value of the key `format`.
        version: value of the key `version`.
    """

    kind: ClassVar[str]
    file_format: ClassVar[str]
    version: ClassVar[int] = 1

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""

    @classmethod
    @abstractmethod
    def from_dict(cls, values: Any, source: str = "the plan") -> Self:
        """Read the plain values of `to_dict`.

        Args:
            values: mapping as `to_dict` gives it.
            source: name of their origin for errors.

        Returns:
            The plan.

        Raises:
            InputError: naming `source` and the key that is missing, unknown or of the wrong kind.
        """

    @classmethod
    def header(cls) -> dict[str, Any]:
        """Return the keys with which the plain values begin."""
        return {"format": cls.file_format, "version": cls.version}

    @classmethod
    def check_keys(cls, values: Any, known: Sequence[str], source: str) -> None:
        """Check that plain values are those of a plan of this kind.

        Args:
            values: read from a file.
            known: keys besides `format` and `version`.
            source: name of their origin for errors.

        Raises:
            InputError: another format or version, or an unknown key.
        """
        if not isinstance(values, Mapping) or values.get("format") != cls.file_format:
            raise InputError(f"{source} is no {cls.kind}: its key 'format' must be '{cls.file_format}'")
        version = values.get("version")
        if isinstance(version, bool) or version != cls.version:
            raise InputError(f"{source} is of version {shown(version)}; only {cls.version} is read")
        names = [*cls.header(), *known]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(str(key)[:100], names, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise InputError(f"{source}: unknown key {shown(key)}{hint}")

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str, source: str | None = None) -> Self:
        """Read the text of `to_json`.

        Args:
            text: JSON.
            source: name of its origin for errors; None for the kind of the plan.

        Returns:
            The plan.

        Raises:
            InputError: as `from_dict`, and if the text is not JSON.
        """
        source = f"the {cls.kind}" if source is None else source
        with as_input_error():
            values = load_json(text, source, _MOST_BYTES)
        return cls.from_dict(values, source)

    def save(self, path: str | Path) -> None:
        """Write the plan as a JSON file, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file of `save`.

        Args:
            path: file to read.

        Returns:
            The plan.

        Raises:
            FileNotFoundError: there is no such file.
            InputError: as `from_json`, naming the file.
        """
        with as_input_error():
            text = read_text(path, _MOST_BYTES)
        return cls.from_json(text, str(path))
