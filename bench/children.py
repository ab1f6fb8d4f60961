"""Processes that a process forks: work apart from it, and how one that ended without a word is told.

A process that has computed on several threads must not fork: a child would wait for threads that it does not
have. So who forks computes on one thread, and its children on as many as they like. They share what it has
built, models above all, until they write to it.
"""

import ctypes
import os
import pickle
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

import torch
from measure import Retold, said

T = TypeVar("T")
Say = Callable[[object], None]
CAN_FORK = hasattr(os, "fork")
DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


@dataclass
class Child:
    """A forked process.

    Attributes:
        pid: of the process.
        words: where what it says comes from.
        ended: whether it has, and was waited for.
    """

    pid: int
    words: Connection
    ended: bool = False

    @classmethod
    def doing(cls, work: Callable[[Say], object], threads: int) -> "Child":
        """Fork one that computes on so many threads. `work` is given what it can say words with; an error
        that leaves it is said too."""
        listening, speaking = Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            listening.close()
            _live(work, threads, speaking)
        speaking.close()
        return cls(pid, listening)

    def hear(self) -> Any:
        """Its next word.

        Raises:
            RuntimeError: it failed (`Retold`), or ended without a word.
        """
        try:
            failed, word = pickle.loads(self.words.recv_bytes())
        except EOFError:
            raise RuntimeError(f"its process {_how(self.wait())}") from None
        if failed:
            raise Retold(word)
        return word

    def wait(self, options: int = 0) -> int:
        """Its status once it has ended, as os.waitpid has it; with os.WUNTRACED also once it has stopped."""
        _, status = os.waitpid(self.pid, options)
        self.ended = not os.WIFSTOPPED(status)
        return status

    def end(self) -> None:
        """End it, whatever it does."""
        if not self.ended:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        self.words.close()


def _live(work: Callable[[Say], object], threads: int, speaking: Connection) -> NoReturn:
    """A child's life. Nothing of what its parent would do at its end is done."""

    def speak(failed: bool, word: object) -> None:
        speaking.send_bytes(pickle.dumps((failed, word)))

    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        torch.set_num_threads(threads)
        work(lambda word: speak(False, word))
    except BaseException as error:  # Ctrl-C too, which its parent gets as well
        speak(True, said(error))
    finally:
        os._exit(0)


def _how(status: int) -> str:
    """How a process ended, from its status."""
    if os.WIFSIGNALED(status):
        return f"was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with status {os.waitstatus_to_exitcode(status)}"


def apart(work: Callable[[], T], threads: int) -> T:
    """What `work` returns, done by a child on so many threads.

    Raises:
        RuntimeError: what it raised (`Retold`), or that its process was ended.
    """
    child = Child.doing(lambda say: say(work()), threads)
    try:
        return child.hear()
    finally:
        child.end()
