"""Downloads of large files over HTTP: resumed, retried, checked.

`requests` (Apache-2.0) carries the transfer and `tenacity` (Apache-2.0) the repetition. Libraries that fetch
whole files (pooch, urllib) start again after every cut, which never ends at 225 GiB.
"""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import requests
import tenacity
import urllib3

from datasets_oc20.disk_space import byte_bar, human
from datasets_oc20.errors import DataError
from datasets_oc20.partial_file import PartialFile, md5_sum
from datasets_oc20.untrusted import AnyPath

_LOG = logging.getLogger(__name__)
_CHUNK = 1 << 20
# The server may answer otherwise later: timeout, too early, too many requests, and its own failures.
_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_LONGEST_SERVER_WAIT = 600.0
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")


class _InterruptedError(Exception):
    """The transfer stopped, and the next try may go on.

    Attributes:
        wait: seconds that the server asks to wait, or None.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Retry:
    """Limits of the repetition of a failed transfer.

    Attributes:
        attempts: failures in a row without a new byte after which to give up.
        first_wait: seconds before the second try; doubled for every one after it, up to `longest_wait`.
        longest_wait: seconds.
        sleep: function that waits a number of seconds.
    """

    attempts: int = 10
    first_wait: float = 1.0
    longest_wait: float = 120.0
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Download:
    """A completed download.

    Attributes:
        path: the file.
        size: bytes of the file.
        fetched: bytes that came over the net in this call.
        seconds: duration of the call.
        md5: the sum that was checked, or None where none is known.
    """

    path: Path
    size: int
    fetched: int
    seconds: float
    md5: str | None


def remote_size(url: str) -> int | None:
    """Ask a server for the size of a file.

    Args:
        url: http or https.

    Returns:
        Bytes, or None where the server does not state them.
    """
    try:
        answer = requests.head(
            url, timeout=30.0, allow_redirects=True, headers={"Accept-Encoding": "identity"}
        )
    except requests.RequestException:
        return None
    return _parse_integer(answer.headers.get("Content-Length")) if answer.ok else None


def fetch(
    url: str,
    target: AnyPath,
    md5: str | None = None,
    retry: Retry | None = None,
    timeout: float = 60.0,
    show_progress: bool = True,
) -> Download:
    """Download `url` to `target`, going on where an earlier run stopped.

    Received bytes are kept in `target.part` until the file is whole and its sum is right; then it takes its
    name. A file that is there already is checked and kept.

    Args:
        url: http or https.
        target: the file to write; its folder must exist.
        md5: hexadecimal MD5 sum; None: not known, a warning says that nothing was checked.
        retry: limits of repetition; by default it gives up after about 10 minutes without a byte.
        timeout: seconds without an answer or a byte after which a try has failed.
        show_progress: draw a progress bar with rate and time left on stderr.

    Raises:
        DataError: the server refuses, all tries failed (received bytes are kept), or the sum is wrong.
        OSError: the disk is full or the folder not writable.
    """
    target = Path(target)
    retry = retry or Retry()
    started = time.monotonic()
    if md5 is None:
        _LOG.warning("%s: no MD5 sum is known for this file, so it cannot be checked.", target.name)
    part = PartialFile(target, url)
    if part.is_complete(md5, show_progress):
        _LOG.info("%s is there already.", target)
        return Download(target, target.stat().st_size, 0, time.monotonic() - started, md5)
    with part, requests.Session() as session:
        transfer = _Transfer(session, part, retry, timeout, show_progress)
        transfer.run()
        actual = md5_sum(part.path, show_progress) if md5 else None
        if actual != md5:
            part.discard()
            raise DataError(
                f"{target}: the MD5 sum of what {url} sent is {actual} instead of {md5}; it was removed, run "
                "the same command again."
            )
        part.complete()
    return Download(target, part.size, transfer.fetched, time.monotonic() - started, md5)


class _Transfer:
    """Repeated requests that complete one partial file.

    Attributes:
        fetched: bytes received.
    """

    def __init__(
        self, session: requests.Session, part: PartialFile, retry: Retry, timeout: float, show_progress: bool
    ) -> None:
        self.fetched = 0
        self._session, self._part, self._retry, self._timeout = session, part, retry, timeout
        self._show_progress = show_progress
        self._failures = 0
        self._farthest = part.size

    def run(self) -> None:
        """Repeat requests until the file is whole; raise `DataError` after the last attempt."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_InterruptedError),
            stop=lambda _: self._failures >= self._retry.attempts,
            wait=self._wait,
            sleep=self._retry.sleep,
            before_sleep=self._log_retry,
            reraise=True,
        )
        try:
            retrying(self._attempt)
        except _InterruptedError as error:
            raise DataError(
                f"{self._part.url}: the download failed {self._failures} times in a row ({error}); "
                f"{human(self._part.size)} are kept in {self._part.path}, run the same command again to "
                "go on."
            ) from error

    def _attempt(self) -> None:
        try:
            self._receive()
        except _InterruptedError:
            # Only a byte never seen before is progress: a server that ignores ranges starts at 0 every time.
            self._failures = 1 if self._part.size > self._farthest else self._failures + 1
            self._farthest = max(self._farthest, self._part.size)
            raise

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.wait if isinstance(error, _InterruptedError) else None
        if asked is not None:
            return min(asked, _LONGEST_SERVER_WAIT)
        wait = self._retry.first_wait * 2.0 ** min(self._failures - 1, 60)
        return min(wait, self._retry.longest_wait)

    def _log_retry(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        wait = state.next_action.sleep if state.next_action else 0.0
        _LOG.warning(
            "%s (%s of %s); trying again in %.0f s.",
            error,
            human(self._part.size),
            human(self._part.total) if self._part.total else "an unknown size",
            wait,
        )

    def _receive(self) -> None:
        """Send one request and store its bytes until it ends."""
        part = self._part
        if part.total is not None and part.size == part.total:
            return
        headers = {"Accept-Encoding": "identity"}
        if part.size:
            headers["Range"] = f"bytes={part.size}-"
            if part.validator:
                headers["If-Range"] = part.validator
        with self._network_errors():
            answer = self._session.get(part.url, headers=headers, stream=True, timeout=self._timeout)
        with answer:
            if answer.status_code == 416 and self._content_range(answer)[1] == part.size > 0:
                return  # all of it is there; the size was not known before
            total = self._check(answer)
            part.describe(total, self._validator(answer))
            with (
                self._network_errors(),
                byte_bar(part.target.name, total, part.size, self._show_progress) as bar,
            ):
                for chunk in answer.raw.stream(_CHUNK, decode_content=False):
                    part.write(chunk)
                    self.fetched += len(chunk)
                    bar.update(len(chunk))
        if total is not None and part.size > total:
            part.restart()
            raise _InterruptedError("the server sent more than it announced")
        if total is not None and part.size < total:
            raise _InterruptedError("the connection ended early")

    def _check(self, answer: requests.Response) -> int | None:
        """Return the size of the whole file if the answer continues the stored part; raise otherwise."""
        part, status = self._part, answer.status_code
        if status in _RETRIED:
            raise _InterruptedError(
                f"the server answers {status}", _parse_integer(answer.headers.get("Retry-After"))
            )
        if status == 416 and part.size:  # the partial file is not a part of what is there now
            part.restart()
            raise _InterruptedError("the file on the server is another than before")
        if status not in (200, 206):
            raise DataError(f"{part.url}: the server answers {status} {answer.reason}; check the address.")
        if answer.headers.get("Content-Type", "").startswith("text/html"):
            raise DataError(f"{part.url}: the server answers with a web page; is there a login in between?")
        if status == 200:
            if part.size:
                _LOG.warning("%s: the server sends the file from its beginning.", part.target.name)
                part.restart()
            return _parse_integer(answer.headers.get("Content-Length"))
        start, total = self._content_range(answer)
        changed = part.total is not None and total is not None and part.total != total
        if start != part.size or changed:
            part.restart()
            raise _InterruptedError("the server sent another range than asked for")
        return total

    @contextlib.contextmanager
    def _network_errors(self) -> Iterator[None]:
        """Turn failures of the network into `_InterruptedError`, impossible addresses into `DataError`."""
        url = self._part.url
        try:
            yield
        except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema) as error:
            raise DataError(f"{url}: not an http or https address.") from error
        except (requests.exceptions.InvalidSchema, requests.exceptions.TooManyRedirects) as error:
            raise DataError(f"{url}: cannot be downloaded ({error}).") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _InterruptedError(f"the connection failed, {type(error).__name__}") from error

    @staticmethod
    def _validator(answer: requests.Response) -> str | None:
        """Name this version of the file for `If-Range`, which takes no weak ETag (RFC 9110, 13.1.5)."""
        tag = answer.headers.get("ETag", "")
        return tag if tag.startswith('"') else answer.headers.get("Last-Modified")

    @staticmethod
    def _content_range(answer: requests.Response) -> tuple[int | None, int | None]:
        """First byte of the answer and size of the whole file, from `Content-Range`."""
        match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        return (_parse_integer(match[1]), _parse_integer(match[2])) if match else (None, None)


def _parse_integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
