"""torchrun with vitpipe's way of ending: the exit code of the stage, and no traceback of torchrun's own.

    python -m vitpipe.stages.ranks_launcher --standalone --nproc-per-node=2 -m vitpipe run STAGE ...

The ranks have said what was wrong. torchrun would add its own stack to that and end with 1, whatever they
ended with, so that an engine could not tell a wrong input (2) from a lost machine. It would also start ranks
again that have ended on purpose: for a wrong input, or because they were asked to stop.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher import api
from torch.distributed.run import parse_args, run

from vitpipe.stages.launch import SAID, die_with_starter

# Of ranks that ended on purpose: the input was wrong, or a signal asked them to save their state and stop.
_FINAL_CODES = {2, *(128 + number for number in (signal.SIGINT, signal.SIGTERM))}


class Agent(LocalElasticAgent):
    """torchrun's agent on one node, which starts no ranks again that have said why they ended."""

    def _monitor_workers(self, *arguments: Any) -> Any:
        result = super()._monitor_workers(*arguments)
        for failure in result.failures.values():
            has_said_it = SAID in failure.error_file_data
            if has_said_it or failure.exitcode in _FINAL_CODES:
                self._remaining_restarts = 0
        if result.is_failed() and self._remaining_restarts > 0:
            print("vitpipe: A rank has died. All start again from the saved state.", file=sys.stderr)
        return result


def main() -> None:
    """Run torchrun with this process's arguments.

    Raises:
        SystemExit: with the exit code of the rank that failed first; 128 + N where signal N ended the ranks.
    """
    die_with_starter()
    # torchrun has no option for the class of its agent.
    vars(api)["LocalElasticAgent"] = Agent
    try:
        # Not its `main`, which would print the messages of the ranks a second time.
        run(parse_args(None))
    except SignalException as stop:
        raise SystemExit(128 + stop.sigval) from None
    except (RendezvousError, DistError) as error:
        reason = str(error).strip().split("\n")[0]
        print(f"vitpipe: This node has lost the others of its job ({reason}).", file=sys.stderr)
        raise SystemExit(1) from None
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        # Negative: the rank was killed by that signal, which nobody has said.
        if code < 0:
            print(f"vitpipe: A rank was killed by signal {-code}.", file=sys.stderr)
        raise SystemExit(128 - code if code < 0 else code) from None


if __name__ == "__main__":
    main()
