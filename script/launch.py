"""torchrun, but it ends in one line and with the exit code of the training: python script/launch.py [flags of torchrun]

75 after SIGTERM or SIGINT, as a training of one process: the same command goes on. If this is killed, its workers write
a checkpoint and end. When a process fails for good, its exit code, or 1 where a signal ended it; what went wrong it has
said itself. torchrun's own notes need LOGLEVEL, its variable for them, e.g. LOGLEVEL=INFO.
"""

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from smoe.train.launcher import LAUNCHER

FAILURE, STOPPED = 1, 75


def main(argv: list[str]) -> int:
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)
    arguments = parse_args(argv)
    if not arguments.no_python:  # else workers may have another parent
        os.environ[LAUNCHER] = str(os.getpid())
    try:
        run(arguments)
    except SignalException as error:
        print(f"error: stopped by {signal.Signals(error.sigval).name}; the same command goes on", file=sys.stderr)
        return STOPPED
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        code = first.exitcode
        how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        print(f"error: rank {rank} ended with {how}, and so did the run", file=sys.stderr)
        return code if code > 0 else FAILURE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
