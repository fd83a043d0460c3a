"""Starts Synapse's processes: by forking one that has imported it, or each by itself.

Importing Synapse takes two seconds of CPU, and the tests start hundreds of processes. A fork is
what Synapse's own tests of many processes use for that.
"""

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

PROJECT = Path(__file__).parents[2]
HOMESERVER = "synapse.app.homeserver"
WORKER = "synapse.app.generic_worker"
_LONGEST_REQUEST = 64 * 1024
_COMMAND = f"from {__name__} import serve; serve()"


class Process(Protocol):
    """A process that was started: what a ``subprocess.Popen`` is, as far as it is used."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


def start(app: str, arguments: list[str], folder: Path, output: BinaryIO) -> Process:
    """Starts Synapse in the folder; what it prints goes to the file.

    Args:
        app: ``HOMESERVER`` or ``WORKER``.
        arguments: of its command line.
    """
    if _starters:
        return _starters[-1].start(app, arguments, folder, output)
    return subprocess.Popen(
        [sys.executable, "-m", app, *arguments],
        cwd=folder,
        env=_environment(),
        stdout=output,
        stderr=subprocess.STDOUT,
    )


@contextmanager
def forking() -> Iterator[None]:
    """Meanwhile processes are forked from one that has imported Synapse; all end with it."""
    starter = _Starter()
    _starters.append(starter)
    try:
        yield
    finally:
        _starters.remove(starter)
        starter.close()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT)}


class _Starter:
    """The process that has imported Synapse, seen from the tests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, str(theirs.fileno())],
                cwd=PROJECT,
                env=_environment(),
                pass_fds=[theirs.fileno()],
            )

    def start(self, app: str, arguments: list[str], folder: Path, output: BinaryIO) -> Process:
        request = json.dumps([app, arguments, str(folder)]).encode()
        reader, writer = os.pipe()
        with self._lock, os.fdopen(writer, "wb"):
            socket.send_fds(self._requests, [request], [output.fileno(), writer])
        return _Forked(reader)

    def close(self) -> None:
        self._requests.close()
        self._process.wait()


_starters: list[_Starter] = []


class _Forked:
    """A forked process. The starter, its parent, tells of its begin and its end.

    Args:
        reader: the end of a pipe that has a line with its ID, and later one with its exit status.
    """

    def __init__(self, reader: int) -> None:
        self._told = os.fdopen(reader, "rb", buffering=0)
        self._lock = threading.RLock()
        self.returncode: int | None = None
        self.pid = self._line()

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None and select.select([self._told], [], [], 0)[0]:
                self.returncode = self._line()
                self._told.close()
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            left_s = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
            if timeout is not None and left_s <= 0:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            try:
                select.select([self._told], [], [], left_s)
            except (OSError, ValueError):
                continue  # another thread has read the end meanwhile
        return status

    def send_signal(self, sig: int) -> None:
        # The starter may have seen the end a moment ago: then there is nobody to tell.
        if self.poll() is None:
            try:
                os.kill(self.pid, sig)
            except ProcessLookupError:
                pass

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _line(self) -> int:
        line = b""
        while not line.endswith(b"\n"):
            part = self._told.read(1)
            assert part, "whoever forks Synapse's processes has ended"
            line += part
        return int(line)


# What follows runs in the process that forks.


def _serve(requests: socket.socket) -> tuple[str, list[str]] | None:
    """Forks for each request, and tells of each end.

    Returns:
        In a forked process what it is to run; None in the first one, once nobody asks any more.
    """
    woken, waker = socket.socketpair()
    woken.setblocking(False)
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, BinaryIO] = {}
    while True:
        ready, _, _ = select.select([requests, woken], [], [])
        if woken in ready:
            woken.recv(4096)
            _tell_of_ends(running)
        if requests not in ready:
            continue
        data, files, _, _ = socket.recv_fds(requests, _LONGEST_REQUEST, 2)
        if not data:
            for process in running:
                os.kill(process, signal.SIGKILL)
            return None
        app, arguments, folder = json.loads(data)
        output, told = files
        process = os.fork()
        if process == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (requests, woken, waker):
                end.close()
            for file in running.values():
                file.close()
            os.close(told)
            _become(folder, output)
            return app, arguments
        os.close(output)
        running[process] = os.fdopen(told, "wb", buffering=0)
        running[process].write(b"%d\n" % process)


def _tell_of_ends(running: dict[int, BinaryIO]) -> None:
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            return
        with running.pop(process) as told:
            try:
                told.write(b"%d\n" % os.waitstatus_to_exitcode(status))
            except BrokenPipeError:
                pass  # nobody waits for this one


def _become(folder: str, output: int) -> None:
    """What a process that was just forked does, to be as one that was started by itself."""
    from twisted.internet import reactor

    os.chdir(folder)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.path[0] = folder
    # The reactor has an epoll instance and a pipe that all forks would share. Synapse has wrapped
    # the former, to measure how long each turn takes.
    forked: Any = reactor
    measured = forked._poller
    type(forked).__init__(forked)
    measured._wrapped = forked._poller
    measured._wrapped_method._wrapped = forked._poller.poll
    forked._poller = measured


def serve() -> None:
    """Forks processes of Synapse for whoever has the other end of the socket in ``argv``."""
    requests = socket.socket(fileno=int(sys.argv[1]))
    import synapse.app.generic_worker
    import synapse.app.homeserver

    assert threading.active_count() == 1, "a thread would be missing in what is forked"
    # Nothing of it is ever collected: else each fork would copy the pages.
    gc.collect()
    gc.freeze()
    if (work := _serve(requests)) is None:
        return
    app, sys.argv[1:] = work
    sys.argv[0] = app
    main = synapse.app.homeserver.main if app == HOMESERVER else synapse.app.generic_worker.main
    main()
