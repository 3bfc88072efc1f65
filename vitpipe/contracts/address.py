"""Addresses of servers, repositories and stores, whose text form hides the password.

    scheme://user:password@host/path?token=...   is shown as   scheme://user:***@host/path?token=***

An address comes from a recipe or the environment, with whatever credentials the user keeps in it. All that
shows or stores one (messages, cards, parameters, outboxes, reports) uses the text form; only the library
that opens the connection is given `secret`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # every message goes through here: pydantic is not worth its import time for those
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

_HIDDEN = "***"
# In a text: user information may hold quotes, the rest ends at one. A path that was made of an address has
# one slash left; what stands after it is taken for an address when it has user and password.
_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*(?:://|:/(?=[^\s/?#@:]+:[^\s/?#]*@)))"
    r"(?P<rest>(?:[^\s/?#]*@)?[^\s'\"<>`]*)"
)
# Words in the names of query parameters whose values are credentials (`sslpassword`, `X-Amz-Signature`, ...).
_SECRET_NAME = r"[^=&#?;]*(?:passw|pwd|token|secret|key|sig|credential|auth)[^=&#?;]*"
_SECRET_PARAMETER = re.compile(rf"(?P<name>[?&;#]{_SECRET_NAME}=)[^&;#]+", re.IGNORECASE)
_PORT = re.compile(r"\d*(?=[/?#]|$)")
# The user of ssh is a name that everybody has (`git`); a lone user of https is mostly an access token.
_PUBLIC_USERS = ("ssh", "git+ssh", "sftp", "scp", "s3", "gs", "hdfs")


def hidden(text: str) -> str:
    """A text with the credentials of every address in it replaced by `***`; the rest stays as it is."""
    return _URL.sub(lambda found: _hidden_address(found["scheme"], found["rest"]), text)


def _hidden_address(scheme: str, rest: str) -> str:
    user, at, place = _split(rest)
    if at:
        name, colon, _ = user.partition(":")
        if colon:
            user = f"{name}:{_HIDDEN}"
        elif scheme.partition(":")[0].lower() not in _PUBLIC_USERS:
            user = _HIDDEN
    return scheme + user + at + _SECRET_PARAMETER.sub(rf"\g<name>{_HIDDEN}", place)


def _split(rest: str) -> tuple[str, str, str]:
    """User information, `@` and the rest; the first two are empty where there is none."""
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in host:
        user = host.rpartition("@")[0]
        return user, "@", rest[len(user) + 1 :]
    # A password with a slash that was not written as %2F: what stands after the colon is no port then.
    _, colon, port = host.partition(":")
    if colon and "@" in rest and not _PORT.match(rest, len(host) - len(port)):
        return rest.rpartition("@")
    return "", "", rest


class Address:
    """An address; `str()`, `repr()`, formatting and JSON give it without credentials.

    Attributes:
        secret: the whole address, for the library that connects. Never show or store it.
    """

    __slots__ = ("secret",)

    def __init__(self, secret: str) -> None:
        self.secret = secret

    def __str__(self) -> str:
        # Nothing of it ends early, as an address in a text does: all of it is the address.
        scheme, mark, rest = self.secret.partition("://")
        return _hidden_address(scheme + mark, rest) if mark else hidden(self.secret)

    def __repr__(self) -> str:
        return f"Address('{self}')"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and self.secret == other.secret

    def __hash__(self) -> int:
        return hash(self.secret)

    def __reduce__(self) -> tuple[type[Address], tuple[str]]:
        return (Address, (self.secret,))  # to a loader process, never to a file

    def is_shown_as(self, text: str) -> bool:
        """Whether `text`, which was stored, is this address without its credentials."""
        return str(self) == text

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """In a model: a text comes in, the text form goes out."""
        from pydantic_core import core_schema

        from_text = core_schema.no_info_after_validator_function(cls, core_schema.str_schema())
        return core_schema.json_or_python_schema(
            json_schema=from_text,
            python_schema=core_schema.union_schema([core_schema.is_instance_schema(cls), from_text]),
            serialization=core_schema.plain_serializer_function_ser_schema(str, when_used="always"),
        )
