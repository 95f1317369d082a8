"""examples/serving/ answers with lit-clip's own numbers, without lit-clip and torch, and nothing makes it do more."""

import ast
import contextlib
import dataclasses
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tomllib
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import lit_clip
from lit_clip import CLIP
from lit_clip.commands.class_heads import HeadFile
from lit_clip.commands.class_sources import class_probabilities
from lit_clip.commands.export import export
from lit_clip.heads import Head, head_from_images, load_head, save_head
from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceTokenizerConfig,
    Preprocessing,
    TextTransformerConfig,
    VisionTransformerConfig,
)
from lit_clip.models.hf_tokenizer import clean
from lit_clip.models.preprocess import image_transform
from tests.conftest import ROOT, made_once
from tests.helpers import forks
from tests.helpers.exports import checkpoint, traced_once
from tests.helpers.towers import WORDS, save_words

SERVING = ROOT / "examples/serving"
# Runs the service where nothing of lit-clip's can be imported, with other limits than its own if need be.
WITHOUT_TORCH = """
import sys
absent = ("torch", "torchvision", "lightning", "lit_clip", "transformers", "open_clip", "onnx")
sys.modules.update(dict.fromkeys(absent))
sys.path.insert(0, sys.argv.pop(1))
import service
exec(sys.argv.pop(1))
service.main()
"""
HURRIED = "service.SECONDS = 1; service.Handler.timeout = 1; service.Server.free = service.threading.Semaphore(2)"
TEXTS = [
    "a dog on a hill",
    "A Photo of a CAT!",
    "the photographer\u2019s \u201cred_car\u201d &amp;amp; two ﬁsh",
    "schÃ¶n 犬 🐕 <|endoftext|> more",
    " \n\t ",
    "a very long caption about a cat " * 30,
]


class Served(NamedTuple):
    """A running service."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path


@contextlib.contextmanager
def serving(folder: Path, log: Path, limits: str = "") -> Iterator[Served]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-I", "-c", WITHOUT_TORCH, str(SERVING), limits, str(folder), "--threads", "1"]
    with log.open("wb") as output, subprocess.Popen([*words, "--port", str(port)], stderr=output) as process:
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert process.poll() is None, log.read_text(encoding="utf-8")
                time.sleep(0.1)
            yield Served(port, process, log)
        finally:
            process.kill()


def ask(port: int, path: str, body: Any = None, method: str = "POST", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.suppress(BrokenPipeError):  # it has been refused before all is sent
        connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, one_line(response.read())


def one_line(answer: bytes) -> Any:
    assert answer.count(b"\n") == 1
    assert answer.endswith(b"\n")
    return json.loads(answer)


def raw(port: int, *parts: bytes, pause: float = 0) -> bytes:
    """Send bytes as they are; return all that is answered."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        with contextlib.suppress(ConnectionError):  # it has been refused before all is sent
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def file_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGE = VisionTransformerConfig(image_size=32, patch_size=16, width=64, layers=1, heads=1)
TEXT = TextTransformerConfig(context_length=16, width=16, layers=1, heads=1)
OTHER_PIXELS = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize_mode="squash")
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
EXPORT = "from lit_clip.weights.export import check_onnx_packages as check; check()"
CROPPED = Preprocessing(32, interpolation="bilinear", crop_pct=0.875)


SHOWN = [noise(40, 30), noise(31, 97), noise(75, 50)]  # of the classes of a head


def logits_of(head: Head, model: CLIP) -> torch.Tensor:
    with torch.inference_mode():
        before, after = model.image_features(torch.stack([model.preprocess(image) for image in SHOWN]))
        return head(before, normalize(after, dim=1))


def config_of(kind: str, words: Path) -> CLIPConfig:
    """Return a model of each way to clean texts; ``words`` is a folder for its tokenizer."""
    if kind == "CLIP":
        return CLIPConfig(16, IMAGE, TEXT)
    if kind == "SigLIP":
        save_words(words, ["<pad>", "</s>", "<unk>"], "$A </s>")
        text = {"causal": False, "tokenizer": HuggingFaceTokenizerConfig(str(words), "canonicalize")}
        more: dict[str, Any] = {"preprocessing": OTHER_PIXELS, "logit_bias": True}
    else:
        save_words(words, BERT, "[CLS] $A [SEP]", sep_token="[SEP]")
        tokenizer = HuggingFaceTokenizerConfig(str(words), "whitespace", strip_sep_token=True)
        text, more = {"causal": False, "pool": "last", "tokenizer": tokenizer}, {"preprocessing": CROPPED}
    return CLIPConfig(16, IMAGE, dataclasses.replace(TEXT, vocab_size=len(WORDS) + 4, **text), **more)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, traces: Path) -> Callable[[str], Path]:
    """Return a folder with ``last.ckpt``, a tiny model of a kind, and ``onnx``, its export; CLIP's is with a head."""

    def make(kind: str, folder: Path) -> None:
        checkpoint(config_of(kind, folder / "words"), folder / "last.ckpt")
        head_file = folder / "head.safetensors"
        if kind == "CLIP":
            model = lit_clip.load_model(folder / "last.ckpt").cpu()
            head = head_from_images(model, SHOWN * 4, [0, 1, 2] * 4, ["a", "b", "c"])
            logits = logits_of(head, model)
            head.facts = dataclasses.replace(head.facts, none=float(logits.amax(dim=1).sort().values[:2].mean()))
            save_head(head, head_file)
        with_head = HeadFile(str(head_file) if head_file.exists() else None)
        with traced_once(traces):
            export(str(folder / "last.ckpt"), format="onnx", output=str(folder / "onnx"), head=with_head)

    return lambda kind: made_once(tmp_path_factory, f"served_{kind}", partial(make, kind))


@pytest.mark.parametrize(
    "kind", ["CLIP", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("SigLIP", "CLIPA"))]
)
def test_features_and_probabilities_equal_lit_clips_where_it_cannot_be_imported(
    exported: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    folder, name = exported(kind), "it\u2019s a red_car & two"
    ours = lit_clip.load_model(folder / "last.ckpt")
    files = [file_of(noise(75, 50)), file_of(noise(31, 97), "JPEG"), file_of(noise(60, 60).convert("P"), "GIF")]
    images = [Image.open(io.BytesIO(file)) for file in files]
    expected = ours.encode([*images, *TEXTS])
    with serving(folder / "onnx", tmp_path / "log") as served:
        for file, feature in zip(files, expected, strict=False):
            status, found = ask(served.port, "/image", file)
            assert status == 200, found
            torch.testing.assert_close(torch.tensor(found["features"]), feature[None], rtol=0, atol=1e-5)
        status, found = ask(served.port, "/text", json.dumps({"texts": TEXTS}))
        assert status == 200, found
        torch.testing.assert_close(torch.tensor(found["features"]), expected[3:], rtol=0, atol=1e-5)
        for template in ("a photo of a {}.", "{}"):
            names = ["dog", name, "sofa"]
            features = ours.encode([template.replace("{}", each) for each in names])
            wanted = class_probabilities(ours.cpu(), expected[:1], features.T)[0].tolist()
            asked = [*(("name", each) for each in [*names, "dog"]), ("template", template)]
            status, found = ask(served.port, f"/classify?{urlencode(asked)}", files[0])
            assert (status, list(found)) == (200, names)
            assert [*found.values()] == pytest.approx(wanted, abs=1e-5)


def test_a_folder_with_a_head_answers_with_the_heads_probabilities(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = exported("CLIP")
    head = load_head(folder / "head.safetensors")
    logits = logits_of(head, lit_clip.load_model(folder / "last.ckpt").cpu())
    with serving(folder / "onnx", tmp_path / "log") as served:
        for row, image in enumerate(SHOWN):
            status, found = ask(served.port, "/head", file_of(image))
            assert (status, [*found["probabilities"]]) == (200, ["a", "b", "c"])
            wanted = head.probabilities(logits)[row].tolist()
            assert [*found["probabilities"].values()] == pytest.approx(wanted, abs=1e-5)
            assert found["none"] == (row == int(logits.amax(dim=1).argmin()))  # the threshold is above one of them


def test_the_lines_of_the_guide_give_lit_clips_probabilities(
    exported: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    (lines,) = (each for each in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "exported_model" in each)
    folder = exported("CLIP")
    (tmp_path / "exported").symlink_to(folder)
    (tmp_path / "photo.png").write_bytes(PHOTO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SERVING)
    exec(lines, {})
    found = json.loads(capsys.readouterr().out.splitlines()[-1])  # after what the export says
    ours = lit_clip.load_model(folder / "last.ckpt")
    features = ours.encode([Image.open(io.BytesIO(PHOTO)), "a photo of a tiger.", "a photo of a pizza."])
    wanted = class_probabilities(ours.cpu(), features[:1], features[1:].T)[0].tolist()
    assert found == pytest.approx(wanted, abs=1e-5)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG file that says how large it is and has no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


PHOTO = file_of(noise(40, 30))
REFUSED: dict[str, tuple[int, str, str, Any]] = {
    "no image": (400, "POST", "/image", b"no image"),
    "no head": (400, "POST", "/head", PHOTO),
    "nothing": (400, "POST", "/image", b""),
    "a format that another program draws": (
        400,
        "POST",
        "/image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ),
    "half an image": (400, "POST", "/image", PHOTO[: len(PHOTO) // 2]),
    "a bomb": (400, "POST", "/image", png_header(100_000, 100_000)),
    "too many pixels": (400, "POST", "/image", png_header(10_000, 5_001)),
    "too elongated": (400, "POST", "/image", file_of(noise(501, 1))),
    "too many bytes": (413, "POST", "/image", b"x" * 10_000_001),
    "no names": (400, "POST", "/classify", PHOTO),
    "a single name twice": (400, "POST", "/classify?name=x&name=x", PHOTO),
    "an empty name": (400, "POST", "/classify?name=", PHOTO),
    "too many names": (400, "POST", "/classify?" + "&".join(f"name={i}" for i in range(101)), PHOTO),
    "too many fields": (400, "POST", "/classify?" + "&".join(["name=x"] * 200), PHOTO),
    "a long name": (400, "POST", f"/classify?name={'x' * 1001}", PHOTO),
    "a long prompt": (400, "POST", f"/classify?name={'x' * 300}&template={'%7B%7D' * 4}", PHOTO),
    "a template without a name": (400, "POST", "/classify?name=x&template=y", PHOTO),
    "no JSON": (400, "POST", "/text", b"{"),
    "no Unicode": (400, "POST", "/text", b'{"texts": ["\xff"]}'),
    "half a character": (400, "POST", "/text", b'{"texts": ["\\ud83d"]}'),
    "deep JSON": (400, "POST", "/text", b"[" * 200_000),
    "a list": (400, "POST", "/text", b"[]"),
    "one text": (400, "POST", "/text", b'{"texts": "a dog"}'),
    "no texts": (400, "POST", "/text", b'{"texts": []}'),
    "numbers": (400, "POST", "/text", b'{"texts": [1]}'),
    "too many texts": (400, "POST", "/text", json.dumps({"texts": ["x"] * 101}).encode()),
    "a long text": (400, "POST", "/text", json.dumps({"texts": ["x" * 1001]}).encode()),
    "a file": (404, "GET", "/service.py", None),
    "a path upwards": (404, "GET", "/../../etc/passwd", None),
    "another path": (404, "POST", "/image/../../etc/passwd", PHOTO),
    "another method": (501, "PUT", "/image", PHOTO),
    "a chunked body": (413, "POST", "/image", iter([PHOTO])),
}


def test_what_is_refused_is_one_line_of_json_and_the_service_goes_on(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    with serving(exported("CLIPA") / "onnx", tmp_path / "log") as served:
        for name, (wanted, method, path, body) in REFUSED.items():
            status, found = ask(served.port, path, body, method)
            assert (status, list(found)) == (wanted, ["error"]), name
            assert "Traceback" not in found["error"], name
            assert str(ROOT) not in found["error"], name
        for length in (b"-1", b"1e3", b"10000001", b"9" * 400, "\u0661".encode()):
            start = b"POST /image HTTP/1.1\r\nContent-Length: " + length
            # Without Expect the service waits for the body of one that is too long, or the client reads no answer.
            for more in (b"", b"\r\nExpect: 100-continue")[length == b"10000001" :]:
                answer = raw(served.port, start, more, b"\r\n\r\n" + PHOTO * (not more))
                assert answer.startswith(b"HTTP/1.1 413"), length
                one_line(answer.partition(b"\r\n\r\n")[2])
        for sent, wanted in (
            (b"GET /" + b"x" * 70_000, b" 414 "),
            (b"GET / HTTP/1.1\r\nA: " + b"x" * 70_000, b" 431 "),
        ):
            answer = raw(served.port, sent + b"\r\n\r\n")
            assert wanted in answer.partition(b"\r\n")[0]
            one_line(answer.partition(b"\r\n\r\n")[2])
        assert ask(served.port, "/health", method="GET") == (200, {"status": "ok"})
        assert ask(served.port, "/image", PHOTO)[0] == 200
    assert "Traceback" not in served.log.read_text(encoding="utf-8")


def test_silent_and_slow_clients_are_cut_off_and_those_behind_them_answered(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    with serving(exported("CLIP") / "onnx", tmp_path / "log", HURRIED) as served:
        begun = time.monotonic()
        answers: list[bytes] = []
        drip = [b"POST /image HTTP/1.1\r\nContent-Length: 5000\r\n\r\n", *[b"x"] * 30]
        slow = threading.Thread(target=lambda: answers.append(raw(served.port, *drip, pause=0.2)))
        slow.start()
        with socket.create_connection(("127.0.0.1", served.port)):  # silent; the service takes two at once
            assert ask(served.port, "/image", PHOTO)[0] == 200
            assert time.monotonic() - begun < 30
        slow.join()
        assert answers[0].startswith(b"HTTP/1.1 408")
        one_line(answers[0].partition(b"\r\n\r\n")[2])


def test_a_stop_answers_what_has_begun(exported: Callable[[str], Path], tmp_path: Path) -> None:
    with serving(exported("CLIP") / "onnx", tmp_path / "log") as served:
        start = b"POST /image HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(PHOTO)
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
            connection.sendall(start + PHOTO[:10])
            assert ask(served.port, "/health", method="GET")[0] == 200  # so that the connection has been taken
            served.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            connection.sendall(PHOTO[10:])
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200")
        assert served.process.wait(60) == 0
    assert "Traceback" not in served.log.read_text(encoding="utf-8")


def test_a_folder_that_is_no_export_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "none"):
        words = [sys.executable, str(SERVING / "service.py"), str(folder), "--port", "0"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr.startswith(f"cannot serve {folder} at 127.0.0.1:0: ")


@pytest.mark.parametrize("first", ["import exported_model", EXPORT])
def test_onnxruntime_reports_no_models_to_its_makers(first: str, tmp_path: Path) -> None:
    """From 1.29 on it stores an id of the machine on import, and later sends names and hashes of models with it."""
    quiet = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    lines = ["import sys", "assert 'onnxruntime' not in sys.modules", f"sys.path.append({str(SERVING)!r})", first]
    (tmp_path / "program.py").write_text("\n".join([*lines, "import onnxruntime"]), encoding="utf-8")
    environment["HOME"] = str(tmp_path)
    (done,) = forks.run([forks.Program(forks.script, [str(tmp_path / "program.py")], tmp_path, environment)], 120)
    assert done.returncode == 0, done.stderr
    assert not [*tmp_path.rglob("*onnxruntime*")]


@pytest.fixture(scope="module")
def module() -> Any:
    spec = util.spec_from_file_location("exported_model", SERVING / "exported_model.py")
    assert spec
    assert spec.loader
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# OpenVINO's CPU plugin sets the stack of signal handlers on processors with AMX. Of two models, the second to end gives
# back the stack of the first, which is gone, and the next signal kills the tests: they end with their own process.
IN_OPENVINO = """
import json, sys
from pathlib import Path
import numpy as np
folder, serving, photo, texts, out = sys.argv[1:]
sys.path.insert(0, serving)
from exported_model import Model
model = Model(Path(folder), openvino=True)
np.save(out, np.concatenate([model.image(Path(photo).read_bytes()), model.texts(json.loads(texts))]))
"""


def test_openvino_gives_the_features_to_the_precision_of_bfloat16(
    module: Any, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    folder, photo, out = exported("CLIP") / "onnx", tmp_path / "photo.png", tmp_path / "features.npy"
    photo.write_bytes(PHOTO)
    words = [str(folder), str(SERVING), str(photo), json.dumps(TEXTS), str(out)]
    subprocess.run([sys.executable, "-c", IN_OPENVINO, *words], check=True, timeout=120)
    model, second = module.Model(folder), np.load(out)
    first = np.concatenate([model.image(PHOTO), model.texts(TEXTS)])
    assert np.abs(first - second).max() < 2e-2
    assert np.linalg.norm(second, axis=1) == pytest.approx(1)


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("size", [32, (32, 48)])
def test_pixels_are_lit_clips_for_every_preprocessing(
    module: Any, size: Any, crop_pct: float, resize_mode: Any
) -> None:
    for interpolation in ("bicubic", "bilinear"):
        ours = Preprocessing(size, interpolation=interpolation, resize_mode=resize_mode, crop_pct=crop_pct)
        facts = {"preprocessing": dataclasses.asdict(ours), "image_encoder": {"shape": ["batch", *ours.shape]}}
        for mode in ("RGB", "RGBA", "L", "P", "1", "CMYK", "I;16"):
            for width, height in ((64, 427), (301, 50), (31, 32), (49, 49)):
                image = (
                    Image.new("I;16", (width, height), 300) if mode == "I;16" else noise(width, height).convert(mode)
                )
                found = torch.from_numpy(module.pixels_of(image, facts)[0])
                torch.testing.assert_close(found, image_transform(ours)(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["lower", "whitespace", "canonicalize"])
def test_texts_are_cleaned_as_lit_clip_cleans_them(module: Any, how: str) -> None:
    for text in TEXTS:
        assert module.cleaned(text, how) == clean(text, how)


def test_the_container_has_what_the_service_imports_and_no_more() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {*project["dependencies"], *project["optional-dependencies"]["export"]}
    required = (SERVING / "requirements.txt").read_text(encoding="utf-8").split()
    assert {*required} <= bounds
    names = {line.partition(">")[0].replace("pillow", "PIL") for line in required}
    container = (SERVING / "Containerfile").read_text(encoding="utf-8")
    copied = set(re.findall(r"\w+\.(?:py|txt)", " ".join(re.findall(r"^COPY (.*) \./$", container, re.MULTILINE))))
    assert copied == {"requirements.txt", *(path.name for path in SERVING.glob("*.py"))}
    imported = set()
    for file in SERVING.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                imported |= {str(each).partition(".")[0] for each in modules}
    assert imported - sys.stdlib_module_names - {"exported_model", "openvino"} == names  # an option
    assert re.findall(r"^USER (.*)$", container, re.MULTILINE) == ["10001:10001"]
