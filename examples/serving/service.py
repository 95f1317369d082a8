"""Answer images and texts over HTTP by a folder of ``lit-clip export --format onnx``; needs requirements.txt alone.

python service.py exported/onnx --port 8000
curl --data-binary @photo.png "http://127.0.0.1:8000/classify?name=tiger&name=pizza"  # {"tiger": 0.98, "pizza": 0.02}
curl --data-binary @photo.png http://127.0.0.1:8000/head  # {"probabilities": {"tiger": 0.98, ...}, "none": false}
curl --data-binary @photo.png http://127.0.0.1:8000/image  # {"features": [[...]]}, of unit length
curl --data '{"texts": ["two cats"]}' http://127.0.0.1:8000/text  # {"features": [[...]]}
"""

import argparse
import json
import signal
import socket
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from exported_model import Model

MOST_BYTES, MOST_TEXTS, LONGEST_TEXT = 10_000_000, 100, 1000  # of a body; of a request, and in characters
SECONDS = 30  # for a request to arrive, and for its answer to be taken
MOST_CONNECTIONS, AT_ONCE = 64, 4  # open, and worked on at the same time; others wait
Answer = tuple[int, dict[str, Any]]
TOO_LONG: Answer = 413, {"error": f"needs a Content-Length of at most {MOST_BYTES:,}"}


def checked(texts: Any, what: str) -> tuple[str, ...]:
    """Return a request's texts; raise ValueError if they are none, too many or too long."""
    good = isinstance(texts, list) and 0 < len(texts) <= MOST_TEXTS
    if not good or not all(isinstance(text, str) and 0 < len(text) <= LONGEST_TEXT for text in texts):
        raise ValueError(f"{what}: needs 1 to {MOST_TEXTS} texts of 1 to {LONGEST_TEXT:,} characters")
    "".join(texts).encode()  # a ValueError for half a character
    return tuple(texts)


def image_features(model: Model, body: bytes, query: str) -> dict[str, Any]:
    return {"features": model.image(body).tolist()}


def text_features(model: Model, body: bytes, query: str) -> dict[str, Any]:
    typed = json.loads(body)
    return {"features": model.texts(checked(isinstance(typed, dict) and typed.get("texts"), "texts")).tolist()}


def probabilities(model: Model, body: bytes, query: str) -> dict[str, Any]:
    typed = parse_qs(query, max_num_fields=MOST_TEXTS + 1)
    names = checked(list(dict.fromkeys(typed.get("name", []))), "name")
    if len(names) == 1 and not model.facts["bias"]:
        raise ValueError("name: a single name gets 100 % of every image; give another")
    template = typed.get("template", ["a photo of a {}."])[0]
    if "{}" not in template:
        raise ValueError("template: needs {} where the name belongs")
    texts = model.texts(checked([template.replace("{}", name) for name in names], "name and template"))
    return dict(zip(names, model.probabilities(model.image(body), texts), strict=True))


def head(model: Model, body: bytes, query: str) -> dict[str, Any]:
    found, none = model.by_head(body)
    return {"probabilities": found, "none": none}


ANSWERS = {"/image": image_features, "/text": text_features, "/classify": probabilities, "/head": head}


class Handler(BaseHTTPRequestHandler):
    """One request for each connection; every answer is one line of JSON."""

    model: Model
    timeout, protocol_version = SECONDS, "HTTP/1.1"
    working = threading.Semaphore(AT_ONCE)

    def setup(self):
        super().setup()
        self.deadline = threading.Timer(SECONDS, self.end_reading)  # also of a client that sends a byte a second
        self.deadline.start()

    def finish(self):
        self.deadline.cancel()
        super().finish()

    def end_reading(self):
        with suppress(OSError):  # the client has gone
            self.connection.shutdown(socket.SHUT_RD)

    def length(self) -> int:
        typed = self.headers.get("Content-Length", "")
        return int(typed) if typed.isascii() and typed.isdigit() and len(typed) < 10 else -1

    def handle_expect_100(self):
        if not 0 <= self.length() <= MOST_BYTES:  # refused before it is sent
            self.send(*TOO_LONG)
            return False
        return super().handle_expect_100()

    def do_GET(self):
        known = self.path == "/health"
        self.send(200 if known else 404, {"status": "ok"} if known else {"error": "GET answers /health alone"})

    def do_POST(self):
        self.send(*self.answer())

    def answer(self) -> Answer:
        path, _, query = self.path.partition("?")
        length = self.length()
        body = self.rfile.read(max(0, min(length, MOST_BYTES)))  # of one too long too, or its client reads no answer
        self.deadline.cancel()
        if not 0 <= length <= MOST_BYTES:
            return TOO_LONG
        if len(body) < length:
            return 408, {"error": f"the body ended early, or took more than {SECONDS} seconds"}
        if path not in ANSWERS:
            return 404, {"error": f"POST answers {', '.join(ANSWERS)}"}
        try:
            with self.working:
                return 200, ANSWERS[path](self.model, body, query)
        except (ValueError, RecursionError) as error:
            return 400, {"error": str(error)}
        except Exception as error:  # onnxruntime and tokenizers have their own
            self.log_error("%r", error)
            return 500, {"error": "the model did not answer; the service's log says why"}

    def send_error(self, code: int, message: str | None = None, explain: str | None = None):
        self.send(code, {"error": message or self.responses[code][0]})  # http.server's own is HTML

    def send(self, status: int, answer: dict[str, Any]):
        body = json.dumps(answer).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """A thread for each of a limited number of connections; those that are open at the end are answered."""

    daemon_threads, request_queue_size = False, 128
    free = threading.Semaphore(MOST_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any):
        self.free.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any):
        super().process_request_thread(request, client_address)
        self.free.release()

    def handle_error(self, request: Any, client_address: Any):
        print("a request ended by", repr(sys.exception()), file=sys.stderr)  # such as a client that has gone


def main():
    parser = argparse.ArgumentParser(description="Answer images and texts over HTTP.")
    parser.add_argument("folder", type=Path, help="written by lit-clip export --format onnx")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: everybody in the network, without a password")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core of the machine")
    parser.add_argument("--openvino", action="store_true", help="in place of onnxruntime; pip install openvino")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # the first process of a container has no handlers
        signal.signal(number, lambda *_: sys.exit())
    try:
        Handler.model = Model(options.folder, options.threads, options.openvino)
        server = Server((options.host, options.port), Handler)
    except Exception as error:
        sys.exit(f"cannot serve {options.folder} at {options.host}:{options.port}: {error}")
    with server:
        server.serve_forever()


if __name__ == "__main__":
    main()
