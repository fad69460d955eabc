"""Messages that name no password: tracking URIs reach errors, logs, pages and records."""

from __future__ import annotations

import logging
import re

# user:password@ of a URI. A password may hold "/" or "@" that a person forgot to encode, so the last "@" ends it.
_USER_INFO = re.compile(r"(://[^\s:/@]*:)\S*@")
_PARAMETER = re.compile(
    r"((?:password|passwd|pwd|passphrase|secret|token|api[_-]?key|signature|sig|credential)=)[^\s&;'\"]+", re.IGNORECASE
)


def without_passwords(text: str) -> str:
    """A text whose URIs show ``***`` in place of passwords, such as ``postgresql://me:***@host``.

    SQLAlchemy's ``make_url`` does the same for one URI that is well formed. This takes whole messages, URIs of servers
    too, passwords that were not encoded, and parameters such as ``?password=`` and the signatures of object stores.
    """
    return _PARAMETER.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))


def error_line(error: BaseException) -> str:
    """The first line of an error's message, or else its type, without passwords and at most 300 characters."""
    lines = str(error).strip().splitlines()
    return without_passwords(lines[0] if lines else type(error).__name__)[:300]


class RedactingFilter(logging.Filter):
    """For a handler: takes the passwords out of what it logs, tracebacks included."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite a record; none is dropped."""
        record.msg, record.args = without_passwords(record.getMessage()), None
        if record.exc_info:
            record.exc_text = without_passwords(logging.Formatter().formatException(record.exc_info))
        return True


def redact_logs(logger: str) -> None:
    """Take the passwords out of what a library's own handlers log.

    Args:
        logger: name of the library's topmost logger.
    """
    for handler in logging.getLogger(logger).handlers:
        if not any(isinstance(found, RedactingFilter) for found in handler.filters):
            handler.addFilter(RedactingFilter())
