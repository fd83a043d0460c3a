"""A TCP forwarder in front of a server's federation port, to cut it off or hold it up."""

import socket
import threading
import time
from collections.abc import Callable
from functools import partial


class Forwarder:
    """Listens on a port of its own and forwards to ``target_port``, both on 127.0.0.1."""

    def __init__(self) -> None:
        self.target_port: int | None = None
        self.refusals: list[float] = []
        """When a connection was refused (monotonic seconds)."""
        self.held = 0
        """How many connections have been held up so far."""
        self._reachable = True
        self._flowing = threading.Event()
        self._flowing.set()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._in_thread(self._accept)

    def offline(self) -> None:
        """Cuts all connections and refuses new ones."""
        self._cut()

    def online(self) -> None:
        """Takes connections again."""
        self._reachable = True

    def hold(self) -> None:
        """Takes new connections, but lets nothing through them until ``release``."""
        self._flowing.clear()

    def release(self) -> None:
        """Lets everything flow again."""
        self._flowing.set()

    def close(self) -> None:
        """Ends the forwarder."""
        _shut(self._listener)  # closing alone would not wake the thread that accepts
        self._listener.close()
        self._cut()
        self._flowing.set()

    def _cut(self) -> None:
        with self._lock:
            self._reachable = False
            for connection in self._open:
                _shut(connection)

    def _opened(self, connection: socket.socket) -> bool:
        """Takes the connection in, so that it can be cut; closes it if nobody may come in now."""
        with self._lock:
            if self._reachable:
                self._open.add(connection)
                return True
        connection.close()
        return False

    def _closed(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.discard(connection)
        connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if self._opened(connection):
                self._in_thread(partial(self._serve, connection))
            else:
                self.refusals.append(time.monotonic())

    def _serve(self, connection: socket.socket) -> None:
        if not self._flowing.is_set():
            self.held += 1
            self._flowing.wait()
        try:
            target = socket.create_connection(("127.0.0.1", self.target_port or 0))
        except OSError:
            self._closed(connection)
            return
        if self._opened(target):
            back = self._in_thread(partial(_pump, target, connection))
            _pump(connection, target)
            back.join()
            self._closed(target)
        self._closed(connection)

    @staticmethod
    def _in_thread(function: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=function, daemon=True)
        thread.start()
        return thread


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass  # cut: the other direction ends as well
    finally:
        _shut(source)
        _shut(target)


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is closed already
