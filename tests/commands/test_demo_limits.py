"""What nobody who speaks HTTP to ``lit-clip demo`` can have it do (extra ``demo``; ``make test-demo``)."""

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lit_clip.commands.demo import MOST_PROMPTS
from lit_clip.commands.demo_limits import MOST_BYTES, MOST_FILES, Limits, Refused, is_accepted
from tests.helpers.demo import answered, ask, file_data, get, png, post, running, skip_without_gradio, upload


def test_gradio_still_waits_by_the_two_intervals_that_the_demo_sets() -> None:
    """By its file, since importing it takes seconds: other names would bring an idle demo's tenth of a core back."""
    skip_without_gradio()
    spec = find_spec("gradio")
    assert spec is not None
    assert spec.origin is not None
    queue = Path(spec.origin).with_name("queueing.py").read_text(encoding="utf-8")
    for name in ("sleep_when_free", "progress_update_sleep_when_free"):
        assert f"self.{name} = " in queue
        assert f"asyncio.sleep(self.{name})" in queue


def test_what_was_not_uploaded_is_neither_opened_nor_copied(served: tuple[int, Path]) -> None:
    port, folder = served
    _, body, _ = upload(port, (folder / "tiger.png").read_bytes())
    (stored,) = json.loads(body)
    uploads = Path(stored).parents[1]
    before = sorted(uploads.iterdir())
    (folder / "link.png").symlink_to(folder / "notes.txt")
    paths = [str(folder / "notes.txt"), str(folder / "pizza.png"), str(folder / "link.png"), "notes.txt"]
    paths += ["/proc/self/environ", "/dev/zero", f"{stored}/../../../photos/notes.txt", f"file://{folder}/notes.txt"]
    files = [file_data(path) for path in paths] + [file_data(None), file_data([stored]), [file_data(paths[0])]]
    files += [{**file_data(paths[0]), "url": f"/gradio_api/file={stored}"}, {"a": file_data(paths[0])}, paths[0]]
    files += [file_data(paths[0], orig_name="a.svg", mime_type="image/svg+xml", is_stream=True)]
    for file in files:
        data = [file, "a, b", "{}"]
        joined = {"data": data, "fn_index": 1, "session_hash": "a"}
        assert post(port, "call/classify", {"data": data})[0] == 400, file
        assert post(port, "call/classify", {"data": [file_data(stored), file, "{}"]})[0] == 400 or file == paths[0]
        assert post(port, "queue/join", joined)[0] == 400, file
        for route in ("run/classify", "api/classify", "call/v2/classify", "component_server", "process_recording"):
            assert post(port, route, {**joined, "image": file})[0] in (404, 405)
    (folder / "link.png").unlink()
    assert sorted(uploads.iterdir()) == before
    told = answered(
        port, "classify", [file_data(stored, url="data:,x", orig_name="../b", size=-1), "tiger, pizza", "{}"]
    )
    assert b"event: complete" in told
    assert b"a secret" not in told


def test_no_address_is_fetched(served: tuple[int, Path]) -> None:
    port, folder = served
    (stored,) = json.loads(upload(port, (folder / "tiger.png").read_bytes())[1])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"
        assert post(port, "call/classify", {"data": [file_data(url), "a, b", "{}"]})[0] == 400
        assert post(port, "call/classify", {"data": [{"url": url, **file_data(None)}, "a, b", "{}"]})[0] == 400
        assert b"complete" in answered(port, "classify", [file_data(stored, url=url), "a, b", "{}"])
        for route in ("proxy=", "file=", "file/"):
            assert get(port, f"/gradio_api/{route}{url}")[0] == 404
        listening.settimeout(1)
        with pytest.raises(TimeoutError):
            listening.accept()


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"no image", 400, "the image: cannot read its image (not an image); fix or remove it"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", 400, "not an image"),
        (png(9000, 9000), 400, "the image: 9000 x 9000 pixels; at most 64,000,000"),
        (png(90_000, 90_000), 400, "exceeds limit of 178956970 pixels"),
        (png(1, 9000), 400, "one side more than 500 times the other"),
        (bytes(MOST_BYTES + 1), 400, "33,554,433 bytes; at most 33,554,432"),
    ],
    ids=["text", "svg", "large", "bomb", "elongated", "bytes"],
)
def test_an_upload_is_an_image_of_bounded_size(
    content: bytes, status: int, message: str, served: tuple[int, Path]
) -> None:
    found, body, _ = upload(served[0], content)
    assert found == status
    assert message in json.loads(body)["detail"]


def test_a_form_of_another_kind_or_size_is_refused(served: tuple[int, Path]) -> None:
    port, folder = served
    image = (folder / "tiger.png").read_bytes()
    for name in ("../../a.html", "/etc/a.png", "a\x00.png", "é" * 500, ".png", "", "a.svg"):
        status, body, _ = upload(port, image, name)
        if status == 200:
            (stored,) = json.loads(body)
            assert re.fullmatch(r"[\w-]+\.png", Path(stored).name), name
            assert get(port, f"/gradio_api/file={stored}")[2]["content-type"] == "image/png"
    assert post(port, "upload", {})[0] == 400
    with socket.create_connection(("127.0.0.1", port), timeout=30) as long:
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 999999999999\r\n\r\n"
        long.sendall(head.encode())
        with pytest.raises(OSError, match=r"reset|pipe"):  # noqa: PT012  # at any of them
            for _ in range(200):
                long.sendall(bytes(2**20))


def test_uploads_are_kept_up_to_a_number(served: tuple[int, Path]) -> None:
    port, folder = served
    image = (folder / "tiger.png").read_bytes()
    (first,) = json.loads(upload(port, image, "first.png")[1])
    time.sleep(0.1)  # clocks of file systems are coarse
    for number in range(MOST_FILES):
        (Path(first).parents[1] / f"{number}").mkdir()
    (last,) = json.loads(upload(port, image, "last.png")[1])
    assert len(list(Path(first).parents[1].iterdir())) == MOST_FILES
    assert not Path(first).exists()
    assert Path(last).exists()
    assert post(port, "call/classify", {"data": [file_data(first), "a, b", "{}"]})[0] == 400


@pytest.mark.parametrize(
    "body",
    [b"", b"[" * 100_000, b'"a"', {"data": 3}, {"data": []}, {"data": ["tiger"]}, {"data": ["tiger", "3"]}]
    + [{"data": ["tiger", each]} for each in (float("nan"), float("inf"), [3], {"a": 3})]
    + [{"data": ["\ud800", 3]}, {"data": [["a"], 3]}, {"data": [None, "a, b", {}]}, {"data": [None, "a, b", "{}", 1]}],
    ids=map(str, range(15)),
)
def test_a_body_of_another_kind_is_refused(body: Any, served: tuple[int, Path]) -> None:
    port, _ = served
    assert post(port, "call/search", body)[0] == 400
    for changed in ({"fn_index": 0, "session_hash": "a"}, {"fn_index": 99}, {"session_hash": "../a"}):
        join = {"data": ["tiger", 3], **changed, **body} if isinstance(body, dict) else body
        status, answer, _ = post(port, "queue/join", join)
        assert status == 400
        assert b"Traceback" not in answer


def test_an_uploaded_image_is_all_that_own_classes_and_where_need(served: tuple[int, Path]) -> None:
    port, folder = served
    (stored,) = json.loads(upload(port, (folder / "tiger.png").read_bytes())[1])
    told = answered(port, "own_classes", [file_data(stored)])
    assert b"event: complete" in told
    assert all(name in told for name in (b"one", b"two", b"three"))
    assert b"event: complete" in answered(port, "locate", [file_data(stored), "tiger", ""])
    assert b"no image: drop one" in answered(port, "own_classes", [None])
    refused = answered(port, "own_classes", [file_data(str(folder / "tiger.png"))])
    assert b"not a request of this page" in refused


def test_a_slow_request_does_not_stop_the_others(served: tuple[int, Path]) -> None:
    """Neither a body that never ends, nor a text of megabytes, nor the most prompts of the greatest length."""
    port, folder = served
    (stored,) = json.loads(upload(port, (folder / "tiger.png").read_bytes())[1])
    with socket.create_connection(("127.0.0.1", port)) as slow, ThreadPoolExecutor(1) as thread:
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 9\r\n\r\n1"
        slow.sendall(head.encode())
        with suppress(ConnectionError):  # answered before it is received whole
            assert post(port, "call/search", {"data": ["a" * 5_000_000, 3]})[0] == 413
        assert b"event: error" in answered(port, "search", ["a" * 500_000, 3])
        names = ", ".join(map(str, range(MOST_PROMPTS)))
        most = thread.submit(answered, port, "classify", [file_data(stored), names, "ab " * 330 + "{}"])
        time.sleep(0.5)
        assert b"event: complete" in answered(port, "search", ["tiger", 3])
        assert get(port, "/")[0] == 200
        assert not most.done()
        assert b"event: complete" in most.result()


@pytest.mark.parametrize("path", ["monitoring", "openapi.json", "login", "gradio_api/runs", "gradio_api/token"])
def test_nothing_but_the_page_is_answered(path: str, served: tuple[int, Path]) -> None:
    port, _ = served
    assert get(port, f"/{path}")[0] == 404
    assert ask(port, "OPTIONS", f"/{path}", Origin="http://somewhere.example")[0] in (403, 405)
    for other in ("vibe-edit/", "cancel", "stream/a", "reset", "call/other"):
        assert post(port, other, {"data": ["tiger", 3], "session_hash": "a", "event_id": "a"})[0] in (400, 405)
    for unknown in ("queue/data?session_hash=unknown", "call/search/unknown"):  # no traceback in the terminal either
        assert b"complete" not in get(port, f"/gradio_api/{unknown}")[1]
    assert get(port, "/assets/../../routes.py")[0] == 404
    assert get(port, "/static/%2e%2e/%2e%2e/routes.py")[0] == 404


def test_other_names_and_other_sites_are_refused(served: tuple[int, Path]) -> None:
    port, _ = served
    for host in (
        "somewhere.example",
        "127.0.0.1.somewhere.example",
        "192.168.1.1",
        "0.0.0.0",
        "",
        "localhost@a",
        "a b",
    ):
        assert get(port, "/", host=host)[0] == 400, host
        assert post(port, "call/search", {"data": ["tiger", 3]}, Host=host)[0] == 400, host
    for origin in (
        "http://somewhere.example",
        "null",
        f"http://localhost:{port}.somewhere.example",
        "http://127.0.0.1",
    ):
        assert post(port, "call/search", {"data": ["tiger", 3]}, Origin=origin)[0] == 403, origin
    assert post(port, "call/search", {"data": ["tiger", 3]}, Origin=f"http://127.0.0.1:{port}")[0] == 200
    assert get(port, "/", host="LOCALHOST")[0] == 200


def test_a_header_gives_the_page_no_other_address(served: tuple[int, Path]) -> None:
    port, _ = served
    names = ("Host", "Server", "Prefix", "For")
    headers = {f"X-Forwarded-{name}": "evil.example" for name in names}
    headers |= {"Forwarded": "host=evil.example", "X-Gradio-Server": "http://evil.example"}
    for name, value in headers.items():
        status, body, _ = ask(port, "GET", "/config", None, **{name: value})
        assert status == 200
        assert json.loads(body)["root"] == f"http://127.0.0.1:{port}", name
        assert b"evil" not in body


@pytest.mark.parametrize(("count", "shown"), [(-5, 1), (0.5, 1), (0, 1), (None, 1), (1e6, 64), (10**400, 64)], ids=str)
def test_a_count_of_images_is_one_that_the_page_takes(
    count: float | None, shown: int, served: tuple[int, Path]
) -> None:
    """Gradio would print a traceback for others."""
    told = answered(served[0], "search", ["tiger", count])
    assert b"event: complete" in told
    assert len(json.loads(told.partition(b"data: ")[2])[0]) == shown


def test_functions_are_told_apart_by_number_and_by_name(tmp_path: Path) -> None:
    async def never(*_: Any) -> None:
        raise AssertionError

    limits = Limits(never, tmp_path, "127.0.0.1", {0: 2, 1: 3}, {"search": 2})
    assert limits._call(b'{"data": ["tiger", 3]}', "search")
    assert limits._call(b'{"data": ["tiger", 3], "fn_index": 0, "session_hash": "a"}', None)
    for called in (b'"fn_index": "search"', b'"fn_index": 1', b'"fn_index": "False"'):
        with pytest.raises(Refused):
            limits._call(b'{"data": ["tiger", 3], "session_hash": "a", ' + called + b"}", None)


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
    monkeypatch.setattr("socket.gethostname", lambda: "Own")
    assert [header for header in accepted + refused if is_accepted(header, host)] == accepted


# Which names are refused at each address is tested above; gradio's start takes four seconds.
@pytest.mark.parametrize("host", ["0.0.0.0", pytest.param("::1", marks=pytest.mark.slow)])
def test_a_demo_that_others_see_refuses_other_names_too(
    host: str, drawings: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    skip_without_gradio()
    with running(drawings[0], tmp_path, "--host", host) as (port, _):
        own = "::1" if ":" in host else "127.0.0.1"
        for name, status in ((f"[{own}]" if ":" in own else own, 200), ("somewhere.example", 400), ("", 400)):
            connection = HTTPConnection(own, port, timeout=30)
            connection.request("GET", "/", headers={"Host": f"{name}:{port}"})
            assert connection.getresponse().status == status
