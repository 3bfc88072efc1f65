"""No code in a checkpoint is run, whatever its pickle asks for."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from vitpipe.models.convert import read_checkpoint


class _Evil:
    """An object of a malicious file: restoring it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "extra": _Evil(tmp_path / "owned")}, tmp_path / "evil.pth")
    assert list(read_checkpoint(tmp_path / "evil.pth")) == ["a"]
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_no_call_in_a_pickle_is_made(tmp_path, protocol):
    """By every protocol, as a call, as a class, as a state: nothing of the file runs."""

    class _Calls:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",))

    content = {"model": {"a": np.zeros(2)}, "x": [_Calls(), {"k": _Calls()}, (_Calls(),)], "f": os.system}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    assert list(read_checkpoint(tmp_path / "a.pkl")) == ["a"]
    assert not (tmp_path / "owned").exists()
