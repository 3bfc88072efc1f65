"""The lock that everybody installs from."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_lock_has_no_address_and_every_package_a_checksum():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    blocks = [block for block in text.split("\n") if block and not block.startswith(("#", " "))]
    assert len(blocks) > 200
    assert all(block.endswith(" \\") for block in blocks)
