"""Tracking URIs without the credentials in them, for all that is shown or kept."""

from __future__ import annotations

import re

_SECRET_OPTION = re.compile(r"([?&][^=&]*(?:pass|pwd|secret|token|key|odbc_connect)[^=&]*=)[^&]*", re.I)
_SERVER_USER = re.compile(r"(?<=://).*@")
_DATABASE_PASSWORD = re.compile(r"(?<=://)([^:@/]*):.*@")


def redact(uri: str) -> str:
    """Return a tracking URI without password; it still works where the environment has the password.

    A server's address also loses the user, which may be a token.
    """
    uri = _SECRET_OPTION.sub(r"\1***", uri)
    return _SERVER_USER.sub("", uri) if uri.startswith("http") else _DATABASE_PASSWORD.sub(r"\1@", uri)


def redact_in(text: object, uri: str) -> str:
    """Return a message in which a tracking URI may stand, with the URI redacted."""
    message = str(text)
    for secret in (uri, uri.rstrip("/")):
        message = message.replace(secret, redact(secret))
    return message
