"""Address of a Kubeflow Pipelines API, how one logs in there, and whether it answers."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from vitpipe.contracts.address import hidden
from vitpipe.contracts.errors import EngineError, InputError
from vitpipe.contracts.files import read_text

_PROBE_SECONDS = 10
_HEALTH = "/apis/v2beta1/healthz"
# An ID token of Google lives for an hour.
_IAP_SECONDS = 2700.0
# Names and values that a header of cookies may hold (RFC 6265, section 4.1.1), somewhat more generously.
_COOKIES = re.compile(r"[^\s=;,]+=[^\s;]*(?:; ?[^\s=;,]+=[^\s;]*)*;?")


@dataclass(frozen=True)
class Login:
    """What proves to an endpoint who asks; at most one of the first three, cookies and a CA beside it.

    Attributes:
        token: bearer token.
        token_file: file with a bearer token, read before every request: Kubernetes renews it.
        client_id: OAuth client ID of Google's Identity-Aware Proxy.
        cookies: of a browser session, as `authservice_session=...` of Dex.
        ca_file: PEM file of the authority that signed the endpoint's certificate.
    """

    # repr=False: tracebacks and logs print the repr.
    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    client_id: str | None = None
    cookies: str | None = field(default=None, repr=False)
    ca_file: Path | None = None

    def check(self) -> None:
        """Refuse what cannot be used, before anything is sent.

        Raises:
            InputError: two ways to log in, a file that cannot be read, or a text that is no cookie.
        """
        ways = {"--token": self.token, "--token-file": self.token_file, "--client-id": self.client_id}
        given = [option for option, value in ways.items() if value]
        if len(given) > 1:
            raise InputError(
                "More than one way to log in was given",
                where=", ".join(given),
                fix="give only one; they may come from the variables KFP_TOKEN, KF_PIPELINES_SA_TOKEN_PATH "
                "and KF_PIPELINES_IAP_OAUTH2_CLIENT_ID",
            )
        if self.token is not None and (not self.token.isprintable() or " " in self.token):
            raise InputError(
                "The bearer token holds spaces or a line break", where="--token", fix="give the token alone"
            )
        if self.token_file is not None:
            read_token(self.token_file)
        if self.cookies is not None and not _COOKIES.fullmatch(self.cookies):
            raise InputError(
                "The cookies are not of the form NAME=VALUE; NAME=VALUE",
                where="--cookies",
                fix="copy the header Cookie of a logged-in browser, for example authservice_session=...",
            )
        if self.ca_file is not None:
            _check_ca(self.ca_file)

    def advice(self) -> str:
        """What to do when the endpoint refuses this login."""
        if self.token:
            return "give another token in KFP_TOKEN: this one has expired, or is of another audience"
        if self.token_file:
            return (
                f"check the token in {self.token_file}: its audience must be the endpoint's "
                "(pipelines.kubeflow.org), and its service account needs a role in the namespace"
            )
        if self.client_id:
            return "check the client ID, and that the Google account has the role IAP-secured Web App User"
        if self.cookies:
            return "copy the cookie of a new browser session: this one has expired, or is of another address"
        return (
            "log in: a bearer token in the variable KFP_TOKEN or by --token-file, the cookies of a browser "
            "session in KFP_COOKIES (Dex), --client-id (Google's IAP), or user and password in --endpoint"
        )


def read_token(path: Path) -> str:
    """The bearer token in a file.

    Raises:
        InputError: it cannot be read or holds no token.
    """
    try:
        token = read_text(path).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InputError(
            f"The token file cannot be read ({reason})",
            where=path,
            fix="give the file that Kubernetes mounts, /var/run/secrets/kubeflow/pipelines/token",
        ) from error
    if not token or not token.isprintable() or " " in token:
        raise InputError(
            "The token file holds no token" if not token else "The token file holds more than a token",
            where=path,
            fix="give a file with the token alone",
        )
    return token


def _check_ca(path: Path) -> None:
    try:
        ssl.create_default_context(cafile=str(path))
    except (OSError, ssl.SSLError) as error:
        reason = "it holds no certificate in PEM form" if isinstance(error, ssl.SSLError) else error.strerror
        raise InputError(
            f"The CA file cannot be used ({reason})",
            where=path,
            fix="give the PEM file of the authority that signed the endpoint's certificate",
        ) from error


class Endpoint:
    """A Kubeflow Pipelines API and a login that has been checked.

    Attributes:
        address: without credentials, for messages, links and the client.
    """

    def __init__(self, address: str, login: Login, basic: str = "") -> None:
        self.address, self.login = address, login
        self._basic = basic
        self._iap, self._iap_until = "", 0.0

    def __repr__(self) -> str:
        return f"Endpoint('{self.address}')"

    @classmethod
    def of(cls, text: str, login: Login | None = None) -> Endpoint:
        """Parse an address that may contain user and password.

        Raises:
            InputError: when it is not the address of an API, has credentials in addition to a login, or as
                `Login.check`.
        """
        login = login or Login()
        try:
            parts = urlsplit(text)
            # A query or fragment would come before the API's path, which is appended to the address.
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
            is_address = is_address and parts.port != 0 and not (parts.query or parts.fragment)
            is_address = is_address and text.isprintable() and " " not in text
        except ValueError:  # of parts.port: not a number, which an unescaped / in a password causes
            is_address = False
        if not is_address:
            raise InputError(
                f"'{text}' is not an API address",
                where="--endpoint",
                fix="write http://host:port or https://host/path; in a password write / as %2F and @ as %40",
            )
        login.check()
        user, at, place = parts.netloc.rpartition("@")
        if at and (login.token or login.token_file or login.client_id):
            raise InputError(
                "Both a bearer token and credentials in the address were given",
                where="--endpoint, --token",
                fix="give only one of them; the token may come from the variable KFP_TOKEN",
            )
        # RFC 7617: base64 of "user:password", after the URL's escapes are undone.
        words = base64.b64encode(unquote(user).encode()).decode() if at else ""
        return cls(parts._replace(netloc=place).geturl().rstrip("/"), login, words)

    def authorization(self) -> tuple[str, str]:
        """Scheme and words of the HTTP header `Authorization`, as of now; empty without a login.

        Raises:
            InputError: as `read_token`.
            EngineError: Google gives no token for the client ID.
        """
        if self._basic:
            return "Basic", self._basic
        if self.login.token:
            return "Bearer", self.login.token
        if self.login.token_file:
            return "Bearer", read_token(self.login.token_file)
        if self.login.client_id:
            if time.monotonic() > self._iap_until:
                self._iap, self._iap_until = iap_token(self.login.client_id), time.monotonic() + _IAP_SECONDS
            return "Bearer", self._iap
        return "", ""

    def advice(self) -> str:
        """What to do when the endpoint refuses the login."""
        return "check user and password in --endpoint" if self._basic else self.login.advice()


def iap_token(client_id: str) -> str:
    """An ID token for Google's Identity-Aware Proxy, of the service account or of the user's own login.

    Raises:
        EngineError: there are no Google credentials here, or Google refuses them.
    """
    from kfp.client import auth

    names = ("KF_PIPELINES_APP_OAUTH2_CLIENT_ID", "KF_PIPELINES_APP_OAUTH2_CLIENT_SECRET")
    try:
        token, _ = auth.get_auth_token(client_id, *(os.environ.get(name) for name in names))
    # google-auth has a dozen of errors, kfp and requests raise others.
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise EngineError(
            f"Google gives no ID token for the client ID ({type(error).__name__}: {reason})",
            where="--client-id",
            fix="name a service account's key by GOOGLE_APPLICATION_CREDENTIALS, or for a user account set "
            f"{' and '.join(names)}",
        ) from error
    if not token:
        raise EngineError(
            "Google gives no ID token for the client ID",
            where="--client-id",
            fix="name a service account's key by GOOGLE_APPLICATION_CREDENTIALS",
        )
    return str(token)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: an API does not send elsewhere, a log-in page does."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow none."""


def probe(endpoint: Endpoint) -> None:
    """Request the endpoint's health, with an error message that names the likely cause.

    Raises:
        EngineError: it cannot be reached, refuses the login, or is something else.
        InputError: as `Endpoint.authorization`.
    """
    # Before kfp is imported, which takes 3 s, and because its client retries an unreachable host for long and
    # logs a warning for each attempt.
    address = f"{endpoint.address}{_HEALTH}"
    fix = (
        "check the address; from outside the cluster forward it first: "
        "kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80, then --endpoint http://localhost:8080"
    )
    try:
        with _opener(endpoint).open(_request(endpoint, address), timeout=_PROBE_SECONDS) as answer:
            json.load(answer)
    except urllib.error.HTTPError as error:
        raise _refusal(endpoint, address, error, fix) from error
    except ValueError as error:
        raise EngineError(
            "The endpoint is not a Kubeflow Pipelines API: it answers with something else, most likely a "
            "page to log in",
            where=address,
            fix=f"{fix}; or {endpoint.advice()}",
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise EngineError(
                f"The endpoint's certificate is not trusted ({reason.verify_message})",
                where=endpoint.address,
                fix="give the PEM file of the authority that signed it: --ca-file FILE",
            ) from error
        raise EngineError(
            f"The endpoint cannot be reached ({hidden(str(reason))})", where=address, fix=fix
        ) from error


def _request(endpoint: Endpoint, address: str) -> urllib.request.Request:
    request = urllib.request.Request(address)
    scheme, words = endpoint.authorization()
    # unredirected: another server must not get the credentials.
    if scheme:
        request.add_unredirected_header("Authorization", f"{scheme} {words}")
    if endpoint.login.cookies:
        request.add_unredirected_header("Cookie", endpoint.login.cookies)
    return request


def _opener(endpoint: Endpoint) -> urllib.request.OpenerDirector:
    import certifi

    # What kfp's client trusts, and without HTTP_PROXY, which it ignores: the probe must take its way.
    context = ssl.create_default_context(cafile=str(endpoint.login.ca_file or certifi.where()))
    handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context), _NoRedirect())
    return urllib.request.build_opener(*handlers)


def _refusal(endpoint: Endpoint, address: str, error: urllib.error.HTTPError, fix: str) -> EngineError:
    if 300 <= error.code < 400:
        target = hidden(error.headers.get("Location", "").partition("?")[0])
        if target.endswith(_HEALTH):
            return EngineError(
                f"The API has another address ({target.removesuffix(_HEALTH)})",
                where=endpoint.address,
                fix=f"give --endpoint {target.removesuffix(_HEALTH)}",
            )
        return EngineError(
            f"The endpoint wants a login: it sends to {target or 'another page'}",
            where=address,
            fix=endpoint.advice(),
        )
    return EngineError(
        f"The endpoint responded with HTTP status {error.code}",
        where=address,
        fix=endpoint.advice() if error.code in (401, 403) else fix,
    )
