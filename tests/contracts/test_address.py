"""Addresses are shown without their credentials, whatever their form."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from vitpipe.contracts.address import Address, hidden


class Holder(BaseModel):
    place: Address


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:5000/a", "http://me:***@host:5000/a"),
        ("postgresql+psycopg2://me:secret@db/mlflow", "postgresql+psycopg2://me:***@db/mlflow"),
        ("https://ghp_secret@github.com/a/b.git", "https://***@github.com/a/b.git"),
        ("ssh://git@host/a.git", "ssh://git@host/a.git"),
        ("ssh://git:secret@host/a.git", "ssh://git:***@host/a.git"),
        ("git@host:a/b.git", "git@host:a/b.git"),
        ("https://me:sec@ret@host/a", "https://me:***@host/a"),
        ("https://me:sec/ret@host/a", "https://me:***@host/a"),
        ("https://:secret@host", "https://:***@host"),
        ("https://host:8080/pages/@scope/name", "https://host:8080/pages/@scope/name"),
        ("https://host/a?token=secret&b=1", "https://host/a?token=***&b=1"),
        ("https://host/a?b=1&X-Amz-Signature=secret", "https://host/a?b=1&X-Amz-Signature=***"),
        ("postgresql://db/a?user=me&password=secret", "postgresql://db/a?user=me&password=***"),
        ("https://me:se'c\"ret@host/a", "https://me:***@host/a"),
        ("https:/me:secret@host/a", "https:/me:***@host/a"),
        ("file:/home/me@work/a", "file:/home/me@work/a"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
        ("/home/me/repository", "/home/me/repository"),
        ("", ""),
    ],
)
def test_what_is_shown(text, shown):
    assert hidden(text) == shown
    assert str(Address(text)) == shown
    assert Address(text).secret == text


def test_an_address_inside_a_message():
    said = "Cannot reach 'https://me:secret@host/a': refused (see http://x:secret@y)."
    assert hidden(said) == "Cannot reach 'https://me:***@host/a': refused (see http://x:***@y)."


NAME = st.text("abcXYZ019._~-", min_size=1, max_size=12)


def test_odd_passwords_in_an_address_itself():
    for password in ("a b", "a<b>", "a`b", "a\nb"):
        assert password not in str(Address(f"https://me:{password}@host/a"))


PASSWORD = st.text("abcXYZ019._~-%!$*+,=@:/'", min_size=1, max_size=20).map(lambda text: f"Q9{text}9Q")


@given(st.sampled_from(["http", "https", "postgresql", "mysql+pymysql", "s3", "ssh"]), NAME, PASSWORD, NAME)
def test_no_password_is_ever_shown(scheme, user, password, host):
    address = Address(f"{scheme}://{user}:{password}@{host}/path?x=1")
    holder = Holder(place=address)
    for text in (
        str(address),
        repr(address),
        f"{address}",
        f"{[address]}",
        holder.model_dump_json(),
        repr(holder),
    ):
        assert password not in text
        assert "Q9" not in text
    assert password not in json.dumps(holder.model_dump())
    assert host in str(address)
    assert address.is_shown_as(str(address))


def test_it_reaches_a_loader_process_whole():
    address = Address("https://me:secret@host")
    assert pickle.loads(pickle.dumps(address)) == address
    assert Holder.model_validate_json('{"place": "https://me:secret@host"}').place == address
