"""Answer images over HTTP with the probabilities of class names, to this machine alone.

python serve.py last.ckpt 8000
curl --data-binary @photo.png "http://127.0.0.1:8000/?name=tiger&name=pizza"  # {"tiger": 0.98, "pizza": 0.02}
"""

import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import lit_clip
from lit_clip.tools.images import open_image


class Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds that a client may be silent

    def do_POST(self):
        try:
            names = parse_qs(urlsplit(self.path).query, max_num_fields=100).get("name", [])
            size = int(self.headers.get("Content-Length", 0))
            if not 1 < len({*names}) == len(names) or max(map(len, names)) > 200 or not 0 < size <= 10_000_000:
                raise ValueError("needs 2 to 100 different names of up to 200 characters, and an image of up to 10 MB")
            image, texts = self.rfile.read(size), [f"a photo of a {name}." for name in names]
            with encoding:
                logits = model.logit_scale.exp() * model.similarity(open_image(io.BytesIO(image), "the image"), texts)
            status, answer = 200, dict(zip(names, logits[0].softmax(0).tolist(), strict=True))
        except ValueError as error:  # lit-clip's errors too
            status, answer = 400, {"error": str(error)}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


if __name__ == "__main__":
    model, encoding = lit_clip.load_model(sys.argv[1]), threading.Lock()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
