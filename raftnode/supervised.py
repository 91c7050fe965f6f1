"""Work that may be killed by what it reads, in a child process. Layer 5.

LMDB maps the file. A page that is not there, or is not the page it should be, can end the process from within
(SIGBUS, SIGSEGV, or an assertion of LMDB's: a page of zeros is enough). A tool for damaged directories has to say so in
words, so a child reads, and the parent waits for it and speaks when the child can't.

The child's output is collected in memory that both share: what it had written when it died is still written out.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import select
import signal
import stat
import struct
from collections.abc import Callable
from typing import BinaryIO, Final

_CRASHES: Final = (signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE, signal.SIGILL)
_PR_SET_PDEATHSIG: Final = 1
_ROOM: Final = 1 << 16
_PATIENCE_MS: Final = 250
_length = struct.Struct("=Q")


class OutputFailed(OSError):
    """The output can't be written: a full disk, say. Nobody reading it any more is a BrokenPipeError instead."""


class Spool:
    """Bytes on their way to a stream, in memory that survives this process. On a terminal every line goes at once.

    Those in `before_waiting` are called each time that the stream, a pipe or a terminal, makes this process wait for
    more than a moment.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.before_waiting: list[Callable[[], None]] = []
        self._stream = stream
        self._poll = _poll_for(stream)
        self._eager = stream.isatty()
        self._memory = mmap.mmap(-1, _length.size + _ROOM)
        self._end = _length.size

    def write(self, line: bytes) -> None:
        """Raises BrokenPipeError when nobody takes the output any more, and OutputFailed; `flush` does as well."""
        end = self._end + len(line)
        if end > _length.size + _ROOM:
            self.flush()
            end = self._end + len(line)
        if len(line) > _ROOM:
            self._hand_over(line)
            return
        self._memory[self._end : end] = line
        self._end = end
        _length.pack_into(self._memory, 0, end - _length.size)
        if self._eager:
            self.flush()

    def flush(self) -> None:
        """Hand everything to the stream."""
        used: int = _length.unpack_from(self._memory)[0]  # the other process may have written it
        waiting = self._memory[_length.size : _length.size + used]
        _length.pack_into(self._memory, 0, 0)
        self._end = _length.size
        self._hand_over(waiting)

    def _hand_over(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:  # an unbuffered stream may take a part
                part = rest if self._poll is None else rest[: select.PIPE_BUF]
                if self._poll is not None and not self._poll.poll(_PATIENCE_MS):
                    for call in self.before_waiting:
                        call()
                    self._poll.poll()
                rest = rest[self._stream.write(part) :]
                self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputFailed(error.errno, error.strerror) from error

    def is_wanted(self, timeout_ms: int) -> bool:
        """Wait; False, and at once, when nobody reads the stream any more."""
        poll = select.poll()
        if self._poll is not None:
            poll.register(self._stream.fileno(), 0)  # errors are always told
        return not poll.poll(timeout_ms)


def _poll_for(stream: BinaryIO) -> select.poll | None:
    """Tells whether PIPE_BUF bytes can be written without waiting; None for a file, which never makes anyone wait."""
    try:
        number = stream.fileno()
        if stat.S_ISREG(os.fstat(number).st_mode):
            return None
    except OSError:  # a stream in memory
        return None
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return poll


def supervise(work: Callable[[], object], crashed: Callable[[str], int]) -> int:
    """Run `work` in a child; the parent returns its exit status.

    `work` ends by SystemExit, or returns for status 0; in the child this never returns. When the child was ended by a
    fault, the status is what `crashed`, called in the parent with the name of the signal, returns. No thread may run.
    """
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _die_with(parent)
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        work()
        raise SystemExit(0)
    return _wait(child, crashed)


def _die_with(parent: int) -> None:
    """Let the kernel end this process when its parent dies, however that happens: nobody would end one that follows a
    log."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _wait(child: int, crashed: Callable[[str], int]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both; the child decides
    signal.signal(signal.SIGTERM, lambda *_: _pass_on(child))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    if -code in _CRASHES:
        return crashed(signal.Signals(-code).name)
    return 128 - code


def _pass_on(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGTERM)
