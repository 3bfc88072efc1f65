"""torchrun with vitpipe's way of ending: the exit code of the stage, and no traceback of torchrun's own.

    python -m vitpipe.stages.ranks_launcher --standalone --nproc-per-node=2 -m vitpipe run STAGE ...

The ranks have said what was wrong. torchrun would add its own stack to that and end with 1, whatever they
ended with, so that an engine could not tell a wrong input (2) from a lost machine.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from vitpipe.stages.launch import die_with_starter


def main() -> None:
    """Run torchrun with this process's arguments.

    Raises:
        SystemExit: with the exit code of the rank that failed first; 128 + N where signal N ended the ranks.
    """
    die_with_starter()
    try:
        torchrun()
    except SignalException as stop:
        raise SystemExit(128 + stop.sigval) from None
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        # Negative: the rank was killed by that signal, which nobody has said.
        if code < 0:
            print(f"vitpipe: A rank was killed by signal {-code}.", file=sys.stderr)
        raise SystemExit(128 - code if code < 0 else code) from None


if __name__ == "__main__":
    main()
