"""The process that has the model: does one task after the other and tells the server how far it is."""

from __future__ import annotations

import signal
import traceback
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING

from dragdiff.errors import UserError, one_line
from dragdiff.ui.tasks import Cancelled, PageTask

if TYPE_CHECKING:
    from dragdiff.ui.one_run import Runner


def work(connection: Connection, cancel: Event, finish: Event, threads: int) -> None:
    """Answers each task with messages, the last of which says "done", "cancelled" or "failed"; None ends the process.

    Args:
        cancel: set to end the task in hand within one step.
        finish: set to end its drag and denoise what there is.
        threads: torch's; 0 = its own choice.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this process
    _first_to_go()
    from dragdiff.ui.one_run import Runner  # torch, diffusers: seconds

    runner = Runner(connection.send, cancel, finish, threads)
    warnings.simplefilter("ignore")
    with suppress(EOFError, OSError):  # the server is gone
        while (task := connection.recv()) is not None:
            connection.send(_outcome(runner, task))


def _outcome(runner: Runner, task: PageTask) -> dict[str, object]:
    try:
        return {"status": "done"} | runner.run(task)
    except Cancelled:
        return {"status": "cancelled"}
    except UserError as error:
        return {"status": "failed", "message": str(error)}
    except Exception as error:  # whatever an edit may run into: the server goes on
        traceback.print_exc()
        return {"status": "failed", "message": f"{type(error).__name__}: {one_line(error)}"}


def _first_to_go() -> None:
    """Where memory runs out, Linux ends this process and not the server."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
