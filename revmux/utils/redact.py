"""Removal of passwords from messages. Tracking URIs may occur in errors, logs, web pages and records."""

from __future__ import annotations

import logging
import re

# user:password@ of a URI. A password may contain an unencoded "/" or "@", so it ends at the last "@".
_USER_INFO = re.compile(r"(://[^\s:/@]*:)\S*@")
_PARAMETER = re.compile(
    r"((?:password|passwd|pwd|passphrase|secret|token|api[_-]?key|signature|sig|credential)=)[^\s&;'\"]+", re.IGNORECASE
)


def without_passwords(text: str) -> str:
    """The text with ``***`` in place of passwords, such as ``postgresql://me:***@host``.

    SQLAlchemy's ``make_url`` does this for a single well-formed URI. This function also handles whole messages, server
    URIs, unencoded passwords, and parameters such as ``?password=`` and the signatures of object stores.
    """
    return _PARAMETER.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))


def error_line(error: BaseException) -> str:
    """The first line of an error's message without passwords, at most 300 characters; its type if it has no message."""
    lines = str(error).strip().splitlines()
    return without_passwords(lines[0] if lines else type(error).__name__)[:300]


class RedactingFilter(logging.Filter):
    """A filter for logging handlers that removes passwords from messages and tracebacks."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record. No record is dropped."""
        try:
            message = record.getMessage()
        except Exception:  # logging itself only reports arguments that do not fit their message
            message = f"{record.msg} {record.args}"
        record.msg, record.args = without_passwords(message), None
        if record.exc_info:
            record.exc_text = without_passwords(logging.Formatter().formatException(record.exc_info))
        return True


def redact_logs(logger: str) -> None:
    """Remove passwords from the output of a library's own logging handlers.

    Args:
        logger: name of the library's top-level logger.
    """
    for handler in logging.getLogger(logger).handlers:
        if not any(isinstance(found, RedactingFilter) for found in handler.filters):
            handler.addFilter(RedactingFilter())
