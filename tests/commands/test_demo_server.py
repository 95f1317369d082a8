"""What nobody who speaks HTTP to ``lit-clip demo`` can have it do (extra ``demo``)."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path

import pytest

from lit_clip.commands.demo_trial import MOST_BYTES, MOST_PROMPTS
from lit_clip.embedding.index import INDEX
from tests.helpers.demo import ask, form, get, png, post, running, skip_without_starlette


def test_what_a_client_types_is_no_path_and_no_address(served: tuple[int, Path]) -> None:
    port, folder = served
    image = (folder / "tiger.png").read_bytes()
    before = sorted(folder.parent.rglob("*"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"
        paths = [folder / "notes.txt", folder / "pizza.png", "/proc/self/environ", f"file://{folder}/notes.txt", url]
        for path in map(str, paths):
            for name in ("classify", "locate", "own_classes"):
                status, answer = post(port, name, {"image": path, "names": "a, b", "texts": "a"})
                assert (status, answer["detail"][:8]) == (400, "no image"), path
            status, answer = post(port, "classify", {"image": image, "names": f"{path}\na"}, name=path)
            assert (status, [*answer]) == (200, [path, "a"])
            assert post(port, "locate", {"image": image, "texts": path, "background": path})[0] == 400  # too few
            assert post(port, "search", {"text": path})[0] == 200
            assert ask(port, "GET", f"/classify?image={path}")[0] == 405
        listening.settimeout(1)
        with pytest.raises(TimeoutError):
            listening.accept()
    assert sorted(folder.parent.rglob("*")) == before  # nothing is stored


def test_no_file_of_this_machine_is_served(served: tuple[int, Path]) -> None:
    port, folder = served
    here = Path(__file__)
    for path in (folder / "notes.txt", folder / INDEX, folder / "pizza.png", here, here.parent / "../conftest.py"):
        for route in ("file=", "file/", "static", "", "demo.js/..", "%2e%2e/"):
            status, body, _ = get(port, f"/{route}{path}")
            assert status in (404, 405), (route, path)
            assert b"a secret" not in body


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "the image: cannot read its image (not an image); fix or remove it"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (png(9000, 9000), "the image: 9000 x 9000 pixels; at most 64,000,000"),
        (png(90_000, 90_000), "exceeds limit of 178956970 pixels"),
        (png(1, 9000), "one side more than 500 times the other"),
        (png(2000, 2000)[:60], "cannot read its image"),
    ],
    ids=["text", "svg", "program", "large", "bomb", "elongated", "truncated"],
)
def test_an_upload_is_an_image_of_bounded_size(content: bytes, message: str, served: tuple[int, Path]) -> None:
    status, answer = post(served[0], "own_classes", {"image": content})
    assert status == 400
    assert message in answer["detail"]


def test_a_form_of_another_kind_or_size_is_refused(served: tuple[int, Path]) -> None:
    port, folder = served
    image = (folder / "tiger.png").read_bytes()
    for name in ("../../a.html", "/etc/a.png", "a\x00.png", "\u00e9" * 500, ".png", "a.svg"):
        assert post(port, "own_classes", {"image": image}, name)[0] == 200
    body, kind = form({"image": image})
    refused = [
        (b"", {}),
        (b"", kind),
        (body[:-9], kind),
        (body[:20], kind),
        (b"[" * 100_000, {"Content-Type": "application/json"}),
        (b"image=%2Fetc%2Fpasswd", {"Content-Type": "application/x-www-form-urlencoded"}),
        (body, {"Content-Type": "multipart/form-data"}),
        (body, {"Content-Type": "multipart/form-data; boundary=other"}),
        (form({f"field{number}": "a" for number in range(100)})[0], kind),
        (form({f"file{number}": b"a" for number in range(100)})[0], kind),
        (form({"image": image, "names": "a" * (2**20 + 1)})[0], kind),
    ]
    for sent, headers in refused:
        status, answer, _ = ask(port, "POST", "/own_classes", sent, **headers)
        assert (status, [*json.loads(answer)]) == (400, ["detail"]), (sent[:100], headers)
    with suppress(ConnectionError):  # answered before it is received whole
        assert post(port, "own_classes", {"image": bytes(MOST_BYTES + 5 * 2**20)})[0] == 413
    with socket.create_connection(("127.0.0.1", port), timeout=30) as long:
        head = f"POST /own_classes HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {kind['Content-Type']}\r\n"
        part = '--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        long.sendall(f"{head}Content-Length: 999999999999\r\n\r\n{part}".encode())
        with pytest.raises(OSError, match=r"reset|pipe"):  # noqa: PT012  # at any of them
            for _ in range(200):
                long.sendall(bytes(2**20))


def test_a_slow_request_does_not_stop_the_others(served: tuple[int, Path]) -> None:
    """Neither a body that never ends, nor a text of megabytes, nor the most prompts of the greatest length."""
    port, folder = served
    image = (folder / "tiger.png").read_bytes()
    with socket.create_connection(("127.0.0.1", port)) as slow, ThreadPoolExecutor(1) as thread:
        kind = "Content-Type: multipart/form-data; boundary=x\r\n"
        slow.sendall(f"POST /search HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{kind}Content-Length: 9\r\n\r\n-".encode())
        status, answer = post(port, "search", {"text": "a" * 500_000})
        assert (status, "at most 1,000" in answer["detail"]) == (400, True)
        names = ", ".join(map(str, range(MOST_PROMPTS)))
        fields = {"image": image, "names": names, "templates": "ab " * 330 + "{}"}
        most = thread.submit(post, port, "classify", fields)
        time.sleep(0.5)
        assert post(port, "search", {"text": "tiger"})[0] == 200
        assert get(port, "/")[0] == 200
        assert not most.done()
        assert most.result()[0] == 200


def test_no_more_than_a_few_requests_are_received_at_once(served: tuple[int, Path]) -> None:
    """Whose bodies would fill a disk together; their clients wait, and others come after them."""
    from lit_clip.commands.demo_server import OPEN

    port, _ = served
    head = f"POST /search HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    slow = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(OPEN)]
    for each in slow:
        each.sendall(f"{head}Content-Length: 9\r\n\r\n-".encode())
    time.sleep(0.5)
    with ThreadPoolExecutor(1) as thread:
        late = thread.submit(post, port, "search", {"text": "tiger"})
        time.sleep(0.5)
        assert get(port, "/")[0] == 200
        assert not late.done()
        for each in slow:
            each.close()
        assert late.result()[0] == 200


def test_nothing_but_the_page_is_answered(served: tuple[int, Path]) -> None:
    port, _ = served
    for path in ("docs", "openapi.json", "classify", "static/demo.js", "demo.js/a", "../demo.py"):
        assert get(port, f"/{path}")[0] in (404, 405)
        assert ask(port, "OPTIONS", f"/{path}", Origin="http://somewhere.example")[0] in (403, 404, 405)
    for path in ("other", "__init__", "model", "searched", "classify/a"):
        assert ask(port, "POST", f"/{path}", b"")[0] == 404
    assert ask(port, "PUT", "/classify", b"")[0] == 405


def test_other_names_and_other_sites_are_refused(served: tuple[int, Path]) -> None:
    port, _ = served
    names = ("somewhere.example", "127.0.0.1.somewhere.example", "192.168.1.1", "0.0.0.0", "", "localhost@a", "a b")
    for host in names:
        assert get(port, "/", host=host)[0] == 400, host
        assert post(port, "search", {"text": "tiger"}, Host=host)[0] == 400, host
    origins = ("http://somewhere.example", "null", f"http://localhost:{port}.somewhere.example", "http://127.0.0.1")
    for origin in origins:
        assert post(port, "search", {"text": "tiger"}, Origin=origin)[0] == 403, origin
    assert post(port, "search", {"text": "tiger"}, Origin=f"http://127.0.0.1:{port}")[0] == 200
    assert get(port, "/", host="LOCALHOST")[0] == 200
    assert get(port, "/classify/", host="127.0.0.1")[0] == 404  # and is sent to no other address
    for name in ("X-Forwarded-Host", "X-Forwarded-Prefix", "Forwarded"):
        status, body, headers = ask(port, "GET", "/", None, **{name: "evil.example"})
        assert status == 200
        assert b"evil" not in body + str(headers).encode()


@pytest.mark.parametrize(
    ("host", "accepted", "refused"),
    [
        ("127.0.0.1", ["localhost:7860", "127.0.0.1", "[::1]:1", "LocalHost."], ["192.168.1.5", "a", "[::2]", "::1"]),
        ("::1", ["[::1]:7860", "[0:0:0:0:0:0:0:1]", "localhost"], ["[::2]", "0.0.0.0"]),
        ("192.168.1.5", ["192.168.1.5:7860", "localhost"], ["192.168.1.6", "192.168.1.5.a", "192.168.1.5:", "a:b"]),
        ("box.lan", ["box.lan", "BOX.lan:7860"], ["lan", "a.box.lan", "box.lan/", "box.lan:7860:1", "box.lan\n"]),
        ("0.0.0.0", ["192.168.1.5", "10.0.0.1:7860", "[fe80::1]", "localhost", "own", "own.local:1"], ["a", "own.a"]),
        ("::", ["[2001:db8::1]:7860", "10.0.0.1", "own"], ["somewhere.example", "2130706433", "0x7f.1", "127.1", ""]),
    ],
)
def test_a_name_is_accepted_that_nobody_else_can_point_here(
    host: str, accepted: list[str], refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_starlette()
    from lit_clip.commands.demo_server import is_accepted

    monkeypatch.setattr("socket.gethostname", lambda: "Own")
    assert [header for header in accepted + refused if is_accepted(header, host)] == accepted


# Which names are refused at each address is tested above.
@pytest.mark.parametrize("host", ["0.0.0.0", pytest.param("::1", marks=pytest.mark.slow)])
def test_a_demo_that_others_see_refuses_other_names_too(
    host: str, drawings: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    skip_without_starlette()
    with running(drawings[0], tmp_path, "--host", host) as (port, _):
        own = "::1" if ":" in host else "127.0.0.1"
        for name, status in ((f"[{own}]" if ":" in own else own, 200), ("somewhere.example", 400), ("", 400)):
            connection = HTTPConnection(own, port, timeout=30)
            connection.request("GET", "/", headers={"Host": f"{name}:{port}"})
            assert connection.getresponse().status == status
