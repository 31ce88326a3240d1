"""Tracking URIs without the credentials in them, for all that is shown or kept."""

from __future__ import annotations

import re
from urllib.parse import unquote

_SECRET_OPTION = re.compile(r"([?&][^=&]*(?:pass|pwd|secret|token|key|odbc_connect)[^=&]*=)([^&]*)", re.I)
_SERVER_USER = re.compile(r"(?<=://)(.*)@")
_DATABASE_PASSWORD = re.compile(r"(?<=://)([^:@/]*):(.*)@")
_SHORTEST = 3  # letters: of a shorter secret every message would be full


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
    for secret in sorted(_secrets(uri), key=len, reverse=True):
        message = message.replace(secret, "***")
    return message


def _secrets(uri: str) -> set[str]:
    """Return what of a tracking URI is secret: as it stands there, and decoded, as drivers say it."""
    found = {match[2] for match in _SECRET_OPTION.finditer(uri)}
    if uri.startswith("http"):
        found |= {match[1].partition(":")[2] or match[1] for match in _SERVER_USER.finditer(uri)}
    else:
        found |= {match[2] for match in _DATABASE_PASSWORD.finditer(uri)}
    return {text for stored in found for text in (stored, unquote(stored)) if len(text) >= _SHORTEST}
