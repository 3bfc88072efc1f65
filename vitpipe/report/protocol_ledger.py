"""The protocol ledger: how a number was measured, as the stage recorded it, beside what the paper states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitpipe.config.recipe import Expectation
from vitpipe.contracts.artifact import Artifact
from vitpipe.contracts.protocol import PROTOCOL


@dataclass(frozen=True)
class LedgerRow:
    """One setting; a text is empty where the paper does not state it, or the stage did not record it."""

    setting: str
    published: str
    ours: str

    @property
    def differs(self) -> bool:
        """Whether both are known and not the same."""
        return bool(self.published and self.ours and self.published != self.ours)


def ledger_of(expectation: Expectation, artifact: Artifact | None) -> tuple[LedgerRow, ...]:
    """The ledger of one number: published settings first, then what only the stage says.

    Args:
        artifact: the output of the expectation's stage; None when it did not run.
    """
    recorded = artifact.tables().get(PROTOCOL, []) if artifact else []
    ours = {row["setting"]: row["value"] for row in recorded if row["metric"] == expectation.metric}
    published = expectation.protocol
    return tuple(
        LedgerRow(setting, published.get(setting, ""), ours.get(setting, ""))
        for setting in dict.fromkeys((*published, *ours))
    )


def differences_in(ledger: Sequence[LedgerRow]) -> list[str]:
    """`crop is 64 of a 64 short side, not 224 of a 256 short side`, of every setting that differs."""
    return [f"{row.setting} is {row.ours}, not {row.published}" for row in ledger if row.differs]
