"""How does one training not disturb the others? It runs in a fresh process, which then tells what it cost.

So its peak memory is its own, its memory is given back, and if it is killed for using too much, the plan goes
on without it. The process is started anew ("spawn"), so a script that calls this, itself or by an experiment,
needs the line `if __name__ == "__main__":` above what it does.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longretriever.errors import LongRetrieverError
from longretriever.evaluate.run import learn
from longretriever.store.behaviors import Store

if TYPE_CHECKING:
    from longretriever.model.train import Tick


_FAREWELL = 30  # seconds in which a process that has answered may clear up


class Broken(LongRetrieverError):
    """A training ended without a model; the message says how."""


def learn_apart(
    store: Path, out: Path, config: Any, threads: int | None, trained: Callable[[Tick], None] | None
) -> dict[str, Any]:
    """`run.learn` on the store at `store`, in a process of its own; its facts and what it cost in memory.

    `trained` is told each step, here. Raises `Broken` when the process fails or is killed; an unfinished
    training goes on at the next call. Ctrl-C here ends the process too.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_learn, args=(sender, store, out, config, threads))
    process.start()
    sender.close()
    try:
        facts = _answer(process, receiver, trained)
        process.join(_FAREWELL)
        return facts
    finally:
        process.terminate()
        process.join()
        receiver.close()


def _answer(process: Any, receiver: Connection, trained: Callable[[Tick], None] | None) -> dict[str, Any]:
    while True:
        try:
            kind, said = receiver.recv()
        except EOFError:
            process.join()
            raise Broken(_ended(process.exitcode)) from None
        if kind == "done":
            return said
        if kind == "broken":
            raise Broken(said)
        if trained:
            trained(said)


def _ended(code: int) -> str:
    if code < 0:
        how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
        why = "; too little memory is the usual reason" if -code == signal.SIGKILL else ""
        return f"the process that trained {how}{why}."
    return f"the process that trained ended with exit code {code} and left no answer."


def _learn(sender: Connection, store: Path, out: Path, config: Any, threads: int | None) -> None:
    """What the process does. If the one that started it is gone, the next word to it fails and ends this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the other one decides
    try:
        facts = learn(Store.open(store), out, config, lambda tick: sender.send(("tick", tick)), threads)
        sender.send(("done", {**facts, "peak_memory_bytes": peak_memory()}))
    except BrokenPipeError:
        return
    except LongRetrieverError as error:
        sender.send(("broken", str(error)))
    except Exception as error:
        sender.send(("broken", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def peak_memory() -> int:
    """Bytes that this process has had in memory at most, pages of memory-mapped files among them.

    Linux hands the maximum of `getrusage` on from the process that started this one, so there the peak is
    read from /proc instead.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
