"""The recipe section of the probe: one learning rate or several, and what is refused when it is read."""

from __future__ import annotations

import pytest

from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import RecipeError


def section(*overrides: str):
    return load_recipe("itpn/pixel_base", "full", [f"probe.{item}" for item in overrides]).probe


@pytest.mark.parametrize(
    ("given", "base_lr", "rates"),
    [
        ("0.3", 0.3, (0.3,)),
        ("[0.3]", 0.3, (0.3,)),
        ("[0.003, 1e-3, 1]", (0.003, 0.001, 1.0), (0.003, 0.001, 1.0)),
    ],
)
def test_one_rate_or_several_in_the_order_given(given, base_lr, rates):
    found = section(f"base_lr={given}")
    assert (found.base_lr, found.rates) == (base_lr, rates)
    # What a finished run has recorded is read again.
    assert type(found).model_validate(found.model_dump(mode="json")) == found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base_lr=[]", r"'probe\.base_lr': the list is empty: give one learning rate or several"),
        ("base_lr=[0.1, 0.2, 0.10]", r"'probe\.base_lr': the list has the learning rate 0\.1 twice"),
        ("base_lr=[0.1, -1]", r"'probe\.base_lr\.1': Input should be greater than 0"),
        ("base_lr=0", r"'probe\.base_lr': Input should be greater than 0"),
        ("base_lr=[0.1, fast]", r"'probe\.base_lr\.1': Input should be a valid number"),
        ("base_lr=[0.1, true]", "true is no number"),
        ("base_lr=[.inf]", "finite"),
        ("neighbours=0", r"'probe\.neighbours': Input should be greater than or equal to 1"),
        ("last_blocks=0", r"'probe\.last_blocks': Input should be greater than or equal to 1"),
        ("temperature=0", r"'probe\.temperature': Input should be greater than 0"),
        ("schedule_unit=week", r"'probe\.schedule_unit': Input should be 'step' or 'epoch'"),
        ("last_block=4", r"did you mean 'last_blocks'"),
    ],
)
def test_wrong_values_are_one_mistake_each(override, message):
    with pytest.raises(RecipeError, match=message) as caught:
        section(override)
    assert "2 mistakes" not in str(caught.value)
    assert caught.value.exit_code == 2
