"""A web server that misbehaves when told to."""

import http.server
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

SLOW = 0.2  # seconds before each answer of a slow server


class Store:
    """The state of the server.

    Attributes:
        url: its address.
        mode: ``well``, ``slow``, ``429``, ``500``, ``silent``, ``reset`` (the connection) or ``cut`` (in the middle of
            a file).
        refused: number of requests that were not answered well since the last :meth:`set`.
    """

    def __init__(self, url: str) -> None:
        self.url, self.mode, self.refused = url, "well", 0
        self._changed = threading.Event()
        self._recovery: threading.Timer | None = None

    def set(self, mode: str, seconds: float | None = None) -> None:
        """Change the mode, and after some seconds back to ``well``."""
        self.mode, self.refused = mode, 0
        self._changed.set()  # lets go of the requests that a silent server holds
        self._changed = threading.Event()
        if self._recovery is not None:
            self._recovery.cancel()
        if seconds is not None:
            self._recovery = threading.Timer(seconds, self._recover)
            self._recovery.start()

    def _recover(self) -> None:
        self.mode = "well"

    def wait(self, seconds: float) -> None:
        """Wait, at most until the mode changes."""
        self._changed.wait(seconds)


class _Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, store: Store, *arguments: Any, **options: Any) -> None:
        self.store = store
        super().__init__(*arguments, **options)

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing."""

    def do_GET(self) -> None:  # noqa: N802  # the name is http.server's
        mode = self.store.mode
        if mode != "well":
            self.store.refused += 1
        if mode == "slow":
            self.store.wait(SLOW)
        if mode in ("429", "500"):
            self.send_error(int(mode))
        elif mode == "silent":
            self.store.wait(600)
            self.close_connection = True
        elif mode == "reset":
            self._reset()
        elif mode == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"begin")
            self._reset()
        else:
            super().do_GET()

    def _reset(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.close_connection = True

    def handle(self) -> None:
        with suppress(ConnectionError, TimeoutError):  # the other side may be killed at any time
            super().handle()

    def finish(self) -> None:
        with suppress(ConnectionError, ValueError):
            super().finish()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def shutdown_request(self, request: Any) -> None:
        request.close()  # without the orderly shutdown, so that a reset is one


@contextmanager
def serving(folder: Path) -> Iterator[Store]:
    """Serve a folder on a free port; the server is gone when the context ends."""
    store = Store("")
    with _Server(("127.0.0.1", 0), partial(_Handler, store, directory=str(folder))) as httpd:
        store.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield store
        finally:
            store.set("well")
            httpd.shutdown()
            thread.join()
