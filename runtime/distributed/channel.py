"""Connection between the leader (rank 0) and one other rank: Python objects over TCP, authenticated with a key.

Both sides have a reading thread, so either notices at once when the other ends: its socket closes, however it ends.
Messages are plain pickles: tensors are copied, whether or not both ranks run on one host."""

import pickle
import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

KEY_BYTES = 32


class Channel:
    """One connection. `send` may be called from any thread; received messages and the end of the connection are
    reported by callbacks in a thread of this channel (see `listen`)."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._sending = threading.Lock()

    @classmethod
    def to(cls, address: tuple[str, int], key: bytes) -> "Channel":
        return cls(Client(address, authkey=key))

    def send(self, message: object) -> None:
        """Pickle and send a message. Raises OSError if the other side has ended."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        with self._sending:
            self._connection.send_bytes(data)

    def receive(self) -> Any:
        """Return the next message. Raises EOFError or OSError at the end of the connection.

        Call it only from the reading thread, or before `listen`."""
        return pickle.loads(self._connection.recv_bytes())

    def listen(self, on_message: Callable[[Any], None], on_close: Callable[[], None]) -> threading.Thread:
        """Start a thread that reads from now on and calls the callbacks; returns the thread."""

        def read() -> None:
            while True:
                try:
                    message = self.receive()
                except (EOFError, OSError):
                    on_close()
                    return
                on_message(message)

        thread = threading.Thread(target=read, name="scail2-rt channel", daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        self._connection.close()


def listener(host: str, key: bytes, backlog: int) -> Listener:
    """Open the socket that the other ranks connect to; `listener.address` holds its port."""
    return Listener((host, 0), backlog=backlog, authkey=key)
