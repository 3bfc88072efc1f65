"""Ways to log in at a Kubeflow endpoint, and that each failure names its cause and fix."""

from __future__ import annotations

import datetime
import ipaddress

import pytest
from kfp_double import KfpDouble

from pipelines.endpoint import Endpoint, Login, probe
from pipelines.submit import submit
from vitpipe.contracts.errors import EngineError, InputError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A PEM file: a self-signed certificate of 127.0.0.1 and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path_factory.mktemp("tls") / "endpoint.pem"
    path.write_bytes(pem)
    return path


def test_a_private_authority_is_trusted_by_its_file(package, certificate):
    with KfpDouble(certificate) as double:
        with pytest.raises(EngineError, match="certificate is not trusted") as caught:
            submit(package.path, double.endpoint)
        assert "--ca-file" in caught.value.fix
        done = submit(package.path, double.endpoint, login=Login(ca_file=certificate))
        assert done.url.startswith("https://")


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), ("no certificate", "PEM")])
def test_a_ca_file_that_is_none(tmp_path, content, message):
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=f"CA file cannot be used .*{message}"):
        Endpoint.of("https://kubeflow.example", Login(ca_file=path))


def test_the_token_of_a_service_account_is_read_anew_for_every_request(package, kfp_api, tmp_path):
    file = tmp_path / "token"
    file.write_text("first\n", encoding="utf-8")
    endpoint = Endpoint.of(kfp_api.endpoint, Login(token_file=file))
    kfp_api.token = "first"
    probe(endpoint)
    # Kubernetes renews the file while `submit --wait` polls.
    file.write_text("second\n", encoding="utf-8")
    kfp_api.token = "second"
    probe(endpoint)
    done = submit(package.path, kfp_api.endpoint, login=Login(token_file=file), wait=True, poll_seconds=0.01)
    assert done.state == "SUCCEEDED"
    assert kfp_api.tokens[0] == "Bearer first"
    assert set(kfp_api.tokens[1:]) == {"Bearer second"}
    kfp_api.token = "third"
    with pytest.raises(EngineError, match="HTTP status 401") as caught:
        probe(endpoint)
    assert str(file) in caught.value.fix


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("", "holds no token"), ("two words", "more than")]
)
def test_a_token_file_without_a_token(tmp_path, content, message):
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        Endpoint.of("https://kubeflow.example", Login(token_file=path))


def test_the_cookies_of_a_browser_session_are_sent(package, kfp_api):
    kfp_api.cookie = "authservice_session=hunter2; other=1"
    kfp_api.login_page = "https://dex.example/auth?client_id=kubeflow&state=hunter3"
    with pytest.raises(EngineError, match=r"wants a login: it sends to https://dex\.example/auth") as caught:
        submit(package.path, kfp_api.endpoint)
    assert "KFP_COOKIES" in caught.value.fix
    assert "hunter" not in str(caught.value)
    login = Login(cookies=kfp_api.cookie)
    assert "hunter2" not in repr(login)
    assert submit(package.path, kfp_api.endpoint, login=login).run_id == "r0"
    with pytest.raises(EngineError, match="wants a login") as caught:
        submit(package.path, kfp_api.endpoint, login=Login(cookies="authservice_session=old"))
    assert "expired" in caught.value.fix


@pytest.mark.parametrize("cookies", ["hunter2", "a=hunter2\nb=c", "a=hunter2 b=c", ""])
def test_what_is_no_cookie_is_refused(cookies):
    with pytest.raises(InputError, match="not of the form NAME=VALUE") as caught:
        Endpoint.of("https://kubeflow.example", Login(cookies=cookies))
    assert "hunter2" not in str(caught.value)


def test_googles_proxy_gets_an_id_token(package, kfp_api, monkeypatch):
    from kfp.client import auth

    asked = []

    def given(client_id, other_id, other_secret):
        asked.append((client_id, other_id, other_secret))
        return "of-google", False

    monkeypatch.setattr(auth, "get_auth_token", given)
    monkeypatch.setenv("KF_PIPELINES_APP_OAUTH2_CLIENT_ID", "desk")
    kfp_api.token = "of-google"
    done = submit(
        package.path, kfp_api.endpoint, login=Login(client_id="me.apps"), wait=True, poll_seconds=0.01
    )
    assert done.state == "SUCCEEDED"
    assert asked == [("me.apps", "desk", None)]
    kfp_api.token = "other"
    with pytest.raises(EngineError, match="401") as caught:
        submit(package.path, kfp_api.endpoint, login=Login(client_id="me.apps"))
    assert "IAP-secured Web App User" in caught.value.fix


def test_without_google_credentials_the_fix_names_them(monkeypatch):
    from google.auth.exceptions import DefaultCredentialsError
    from kfp.client import auth

    def refused(*_):
        raise DefaultCredentialsError("no\ncredentials")

    monkeypatch.setattr(auth, "get_auth_token", refused)
    with pytest.raises(EngineError, match=r"no ID token .*: no credentials\)") as caught:
        Endpoint.of("https://kubeflow.example", Login(client_id="me")).authorization()
    assert "GOOGLE_APPLICATION_CREDENTIALS" in caught.value.fix


def test_one_way_to_log_in_is_enough(tmp_path):
    file = tmp_path / "token"
    file.write_text("t", encoding="utf-8")
    with pytest.raises(InputError, match="More than one way") as caught:
        Endpoint.of("https://kubeflow.example", Login(token="hunter2", token_file=file, client_id="c"))
    assert "hunter2" not in str(caught.value)
    with pytest.raises(InputError, match="line break"):
        Endpoint.of("https://kubeflow.example", Login(token="hunter2\n"))


def test_an_address_that_has_moved(kfp_api):
    kfp_api.token = "t"
    kfp_api.login_page = "https://kubeflow.example/pipeline/apis/v2beta1/healthz"
    with pytest.raises(EngineError, match="another address") as caught:
        probe(Endpoint.of(kfp_api.endpoint))
    assert caught.value.fix == "give --endpoint https://kubeflow.example/pipeline"
