"""Large files over HTTP: resumed, retried, checked.

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

from datasets_oc20.disk_space import human
from datasets_oc20.errors import DataError
from datasets_oc20.partial_file import PartialFile, is_complete, md5_sum
from datasets_oc20.progress import byte_bar
from datasets_oc20.untrusted import AnyPath

_LOG = logging.getLogger(__name__)
_CHUNK = 1 << 20
# The server may answer otherwise later: timeout, too early, too many requests, and its own failures.
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_LONGEST_WAIT_ASKED = 600.0
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")


class _InterruptedError(Exception):
    """The transfer stopped, and the next try may go on; `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Retry:
    """When to give up, and how long to wait before the next try.

    Args:
        attempts: failures in a row without a new byte after which to give up.
        first_wait: seconds before the second try; doubled for every further one, up to `longest_wait`.
        longest_wait: see there.
        sleep: how to wait.
    """

    attempts: int = 10
    first_wait: float = 1.0
    longest_wait: float = 120.0
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Download:
    """What was done: `size` bytes are at `path`, of which `fetched` came over the net in `seconds`.

    `md5` is the sum that was checked, or None where none is known.
    """

    path: Path
    size: int
    fetched: int
    seconds: float
    md5: str | None


def remote_size(url: str, timeout: float = 30.0) -> int | None:
    """The size of the file at `url` in bytes, or None where the server does not say."""
    try:
        answer = requests.head(
            url, timeout=timeout, allow_redirects=True, headers={"Accept-Encoding": "identity"}
        )
    except requests.RequestException:
        return None
    return _number(answer.headers.get("Content-Length")) if answer.ok else None


def fetch(
    url: str,
    target: AnyPath,
    md5: str | None = None,
    retry: Retry | None = None,
    timeout: float = 60.0,
    show_progress: bool = True,
) -> Download:
    """Download `url` to `target`, going on where an earlier run stopped.

    What arrives is kept in `target.part` until it is whole and its sum is right; then it takes its name. A
    file that is there already is checked and kept.

    Args:
        url: http or https.
        target: the file to write; its folder must exist.
        md5: hexadecimal MD5 sum; None: not known, a warning says that nothing was checked.
        retry: patience; by default about 10 minutes without a byte.
        timeout: seconds without an answer or a byte after which a try has failed.
        show_progress: a progress bar with rate and time left on stderr.

    Raises:
        DataError: the server refuses, all tries failed (what has arrived is kept), or the sum is wrong.
        OSError: the disk is full or the folder not writable.
    """
    target = Path(target)
    retry = retry or Retry()
    started = time.monotonic()
    if md5 is None:
        _LOG.warning("%s: no MD5 sum is known for this file, so it cannot be checked.", target.name)
    if is_complete(target, md5, show_progress):
        _LOG.info("%s is there already.", target)
        return Download(target, target.stat().st_size, 0, time.monotonic() - started, md5)
    with PartialFile(target, url) as part, requests.Session() as session:
        transfer = _Transfer(session, part, retry, timeout, show_progress)
        transfer.run()
        found = md5_sum(part.path, show_progress) if md5 else None
        if found != md5:
            part.discard()
            raise DataError(
                f"{target}: the MD5 sum of what {url} sent is {found} instead of {md5}; it was removed, run "
                "the same command again."
            )
        part.complete()
    return Download(target, part.size, transfer.fetched, time.monotonic() - started, md5)


class _Transfer:
    """The tries to complete one partial file."""

    def __init__(
        self, session: requests.Session, part: PartialFile, retry: Retry, timeout: float, show_progress: bool
    ) -> None:
        self.fetched = 0
        self._session, self._part, self._retry, self._timeout = session, part, retry, timeout
        self._show_progress = show_progress
        self._failures = 0
        self._farthest = part.size

    def run(self) -> None:
        """Try until the file is whole; raises `DataError` when there is no hope."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_InterruptedError),
            stop=lambda _: self._failures >= self._retry.attempts,
            wait=self._wait,
            sleep=self._retry.sleep,
            before_sleep=self._say,
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
            return min(asked, _LONGEST_WAIT_ASKED)
        wait = self._retry.first_wait * 2.0 ** min(self._failures - 1, 60)
        return min(wait, self._retry.longest_wait)

    def _say(self, state: tenacity.RetryCallState) -> None:
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
        """One request, as far as it goes."""
        part = self._part
        if part.total is not None and part.size == part.total:
            return
        headers = {"Accept-Encoding": "identity"}
        if part.size:
            headers["Range"] = f"bytes={part.size}-"
            if part.validator:
                headers["If-Range"] = part.validator
        with _network_errors(part.url):
            answer = self._session.get(part.url, headers=headers, stream=True, timeout=self._timeout)
        with answer:
            if answer.status_code == 416 and _range(answer)[1] == part.size > 0:
                return  # all of it is there; the size was not known before
            total = self._check(answer)
            part.describe(total, _validator(answer))
            with (
                _network_errors(part.url),
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
        """The size of the whole file, after making sure that what comes now belongs behind what is there."""
        part, status = self._part, answer.status_code
        if status in _TRY_AGAIN:
            raise _InterruptedError(
                f"the server answers {status}", _number(answer.headers.get("Retry-After"))
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
            return _number(answer.headers.get("Content-Length"))
        start, total = _range(answer)
        changed = part.total is not None and total is not None and part.total != total
        if start != part.size or changed:
            part.restart()
            raise _InterruptedError("the server sent another range than asked for")
        return total


@contextlib.contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Failures of the network as `_InterruptedError`, impossible addresses as `DataError`."""
    try:
        yield
    except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema) as error:
        raise DataError(f"{url}: not an http or https address.") from error
    except (requests.exceptions.InvalidSchema, requests.exceptions.TooManyRedirects) as error:
        raise DataError(f"{url}: cannot be downloaded ({error}).") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _InterruptedError(f"the connection failed, {type(error).__name__}") from error


def _validator(answer: requests.Response) -> str | None:
    """What names this version of the file in `If-Range`, which takes no weak ETag (RFC 9110, 13.1.5)."""
    tag = answer.headers.get("ETag", "")
    return tag if tag.startswith('"') else answer.headers.get("Last-Modified")


def _range(answer: requests.Response) -> tuple[int | None, int | None]:
    """First byte of what is sent and size of the whole file, from `Content-Range`."""
    found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    return (_number(found[1]), _number(found[2])) if found else (None, None)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
