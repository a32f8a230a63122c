"""The connection between the leading process and each of the others: Python objects over TCP, with a key.

Both sides have a thread that reads, so that either notices at once when the other is gone: its socket closes, however
it ends. Plain pickle: tensors travel by value, whatever host they go to."""

import pickle
import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

KEY_BYTES = 32


class Channel:
    """One connection. `send` from any thread; what arrives goes to `heard`, the end of the connection to `gone`, both
    in a thread of this channel."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._sending = threading.Lock()

    @classmethod
    def to(cls, address: tuple[str, int], key: bytes) -> "Channel":
        return cls(Client(address, authkey=key))

    def send(self, message: object) -> None:
        """OSError when the other side is gone."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        with self._sending:
            self._connection.send_bytes(data)

    def receive(self) -> Any:
        """The next message; EOFError or OSError when there will be none. For the reading thread, and before it."""
        return pickle.loads(self._connection.recv_bytes())

    def listen(self, heard: Callable[[Any], None], gone: Callable[[], None]) -> threading.Thread:
        """Read from now on, in the thread that is returned."""

        def read() -> None:
            while True:
                try:
                    message = self.receive()
                except (EOFError, OSError):
                    gone()
                    return
                heard(message)

        thread = threading.Thread(target=read, name="scail2-rt channel", daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        self._connection.close()


def listener(host: str, key: bytes, backlog: int) -> Listener:
    """Where the other processes connect to; `listener.address` says its port."""
    return Listener((host, 0), backlog=backlog, authkey=key)
