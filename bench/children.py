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
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

import torch
from measure import Retold, said

T = TypeVar("T")
CAN_FORK = hasattr(os, "fork")
DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


@dataclass
class Child:
    """A forked process.

    Attributes:
        pid: of the process.
        words: between it and its parent.
        status: once it has ended and was waited for.
    """

    pid: int
    words: Connection
    status: int | None = None

    @classmethod
    def doing(cls, work: Callable[[Connection], object], threads: int) -> "Child":
        """Fork one that does `work` on so many threads, and ends. An error that leaves `work` is said."""
        mine, its = Pipe()
        pid = os.fork()
        if pid == 0:
            mine.close()
            _live(work, threads, its)
        its.close()
        return cls(pid, mine)

    @classmethod
    def answering(cls, answer: Callable[[Any], object], threads: int) -> "Child":
        """Fork one that answers questions (`ask`) until it is ended."""
        return cls.doing(partial(_answer, answer), threads)

    def ask(self, question: object) -> Any:
        """Its answer. Raises as `hear` does."""
        self.words.send_bytes(pickle.dumps(question))
        return self.hear()

    def hear(self) -> Any:
        """Its next word.

        Raises:
            RuntimeError: it failed (`Retold`), or ended without a word.
        """
        try:
            failed, word = pickle.loads(self.words.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise RuntimeError(f"its process {_how(self.wait())}") from None
        if failed:
            raise Retold(word)
        return word

    def wait(self, options: int = 0) -> int:
        """Its status once it has ended, as os.waitpid has it; with os.WUNTRACED also once it has stopped."""
        if self.status is not None:
            return self.status
        _, status = os.waitpid(self.pid, options)
        if not os.WIFSTOPPED(status):
            self.status = status
        return status

    def end(self) -> None:
        """End it, whatever it does. Once more does nothing."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        self.words.close()


def say(words: Connection, word: object, failed: bool = False) -> None:
    """What a child says, for its parent to hear."""
    words.send_bytes(pickle.dumps((failed, word)))


def _answer(answer: Callable[[Any], object], words: Connection) -> None:
    while True:
        say(words, answer(pickle.loads(words.recv_bytes())))


def _live(work: Callable[[Connection], object], threads: int, words: Connection) -> NoReturn:
    """A child's life. Nothing of what its parent would do at its end is done."""
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        torch.set_num_threads(threads)
        work(words)
    except BaseException as error:  # Ctrl-C too, which its parent gets as well
        say(words, said(error), failed=True)
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
    child = Child.doing(lambda words: say(words, work()), threads)
    try:
        return child.hear()
    finally:
        child.end()
