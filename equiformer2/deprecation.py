"""Warning about a replaced name; CONTRIBUTING.md has the policy."""

import logging

logger = logging.getLogger(__name__)

_given: set[str] = set()


def warn_once(message: str) -> None:
    """Log a warning, once per process and message; without any logging set up it appears on standard error.

    Args:
        message: the old name and its replacement.
    """
    if message not in _given:
        _given.add(message)
        logger.warning(message)
