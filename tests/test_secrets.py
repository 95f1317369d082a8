"""Secrets do not reach messages: passwords in addresses, tokens, and variables that a configuration names."""

import time

import pytest

from lit_clip import secrets
from lit_clip.errors import BadSample, InputError
from lit_clip.secrets import (
    is_secret,
    plain_without_secrets,
    reference,
    remember,
    remember_environment,
    without_secrets,
)
from lit_clip.tools.untrusted import shortened


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", {})
    return


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:s3cret@host/t.csv: row 2", "https://me:***@host/t.csv: row 2"),
        ("https://me:s3/cr@et@host/t.csv", "https://me:***@host/t.csv"),
        ("https://s3cret@host/t.csv", "https://***@host/t.csv"),
        ("postgresql+psycopg://me:s3cret@host:5432/db", "postgresql+psycopg://me:***@host:5432/db"),
        ("a https://a:s3cret@b/c, then ftp://d:s3cret@e", "a https://a:***@b/c, then ftp://d:***@e"),
        ("https://host/a?x=1&access_token=s3cret&y=2", "https://host/a?x=1&access_token=***&y=2"),
        ("https://host/a?token=s3cret: refused", "https://host/a?token=***: refused"),
        ("s3://b/k?X-Amz-Credential=s3cret&X-Amz-Signature=s3cret#f", "s3://b/k?X-Amz-Credential=***&X-Amz-Signature=***#f"),
        ("https://a.blob/c?sv=2020&sig=s3cret%2B%3D", "https://a.blob/c?sv=2020&sig=***"),
        ("https://h/x?api_key=s3cret 'https://h/y?key=s3cret'", "https://h/x?api_key=*** 'https://h/y?key=***'"),
        ("{'Authorization': 'Bearer s3cret'}", "{'Authorization': 'Bearer ***'}"),
        ("X-Api-Key: s3cret, Cookie: id=s3cret; b=s3cret", "X-Api-Key: ***, Cookie: ***"),
        ("https://s3cret@a,https://me:s3cret@b", "https://***@a,https://me:***@b"),
        ("'https://me:s3cret'1@host/t.csv': row 2", "'https://me:***@host/t.csv': row 2"),
        ("http://me:8080@host", "http://me:***@host"),
        ("no such file: a/http:/me:s3cret@host/x.png", "no such file: a/http://me:***@host/x.png"),  # a Path of it
        ("a/https:/s3cret@host/x", "a/https://***@host/x"),
        ("a/http:/me:s3/cr@et@host/x", "a/http://me:***@host/x"),
        ("invalid token hf_s3crets3crets3crets3cret", "invalid token hf_***"),
    ],
)  # fmt: skip
def test_passwords_and_tokens_in_addresses_are_hidden(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert "s3cret" not in str(InputError(text))
    bad = BadSample(text, "broken", f"{text} is broken")
    assert not any("s3cret" in part for part in (str(bad), bad.where, bad.detail))


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:5000/a@b",
        "http://localhost:8080?email=a@b",
        "http://localhost:5000#x@y",
        "https://[::1]:8080/a@b",
        "class cookie: key=value",
        "s3://bucket/a@b.jpg",
        "C:/photos@home/a.jpg",
        "s3:/bucket/a@b.jpg",
        "file:///me@home/a.jpg",
        "https://h/x?page=2&size=3",
        "me@host.org: a=b",
        "https://me:${oc.env:PASSWORD}@host?token=${oc.env:TOKEN}",
        "authorization failed for https://host:8080",
        "data.train: key=value",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_values_of_variables_are_hidden_in_any_form_and_named(tmp_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("pass/word 1", "gpu", "0.25", "true", str(tmp_path), "shawl"):
        remember(value, reference("PW"))
    assert without_secrets("pass/word 1, pass%2Fword%201") == "${oc.env:PW}, ${oc.env:PW}"
    for text in ("on the gpu", "0.25 of them", f"{tmp_path}/a", "true", "shawls"):  # no secrets, or parts of words
        assert without_secrets(text) == text
    assert without_secrets("'shawl'") == "'${oc.env:PW}'"
    monkeypatch.setenv("SOME_API_KEY", "0123456789abcdef")
    remember_environment()
    assert str(InputError("key 0123456789abcdef")) == "key ${oc.env:SOME_API_KEY}"


def test_settings_for_checkpoints_and_loggers_keep_what_opens_the_checkpoint() -> None:
    remember("my-org/encoder", reference("TEXT_ENCODER"))
    own = {"class_path": "a.B", "init_args": {"key": "my-org/encoder"}}
    settings = {
        "architecture": {"text": {"hugging_face": "my-org/encoder", "layers": 2}, "image": own},
        "pretrained": "https://me:s3cret@host/w.pt",
        "note": ["my-org/encoder", 3],
        "address": "https://me:my-org/encoder@host",
    }
    kept = plain_without_secrets(settings)
    assert kept["architecture"]["text"] == settings["architecture"]["text"]
    assert kept["architecture"]["image"]["init_args"] == {"key": "***"}
    assert (kept["pretrained"], kept["note"]) == ("https://me:***@host/w.pt", ["***", 3])
    assert kept["address"] == "https://me:***@host"
    assert plain_without_secrets({"pretrained": "my-org/encoder"}) == {"pretrained": "my-org/encoder"}


def test_what_opens_or_resumes_a_checkpoint_is_never_changed_within_a_word() -> None:
    for value in ("resnet10", "Contrastive", "classes", "s3cret-w0rd"):
        remember(value, reference("SOME_KEY"))
    architecture = {"image": {"timm": "resnet10t"}, "text": {"layers": 2}}
    settings = {"architecture": architecture, "freeze": {"image": "classes"}, "lora": {"modules": ["classes"]}}
    assert plain_without_secrets(settings) == settings
    assert plain_without_secrets({"x": {"class_path": "a.Contrastive"}}) == {"x": {"class_path": "a.Contrastive"}}
    part = {"class_path": "lit_clip.losses.pairwise.Contrastive", "init_args": {"duplicates": "classes"}}
    assert plain_without_secrets({"loss": part}, opens=True) == {"loss": part}
    part["init_args"] = {"token": "classes", "other": "s3cret-w0rd", "address": "https://me:s3cret-w0rd@host"}
    kept = plain_without_secrets({"loss": part}, opens=True)["loss"]["init_args"]
    assert kept == {"token": "***", "other": "***", "address": "https://me:***@host"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "a"), ("PW", "a"), ("DB_PASSWORD", "a"), ("MY_KEY_2", "a"), ("AUTH", "a"), ("PASSWORD1", "a"),
        ("api_key", "a"), ("key", "a"), ("x", "0f8a6c1b9d3e57a2"), ("x", "sk-live-a8Fk20sLx9Qp3Zb7"),
    ],
)  # fmt: skip
def test_a_secret_has_the_name_of_one_or_looks_random(name: str, value: str) -> None:
    assert is_secret(name, value)


@pytest.mark.parametrize("name", ["RUN", "AUTHOR", "TOKENIZER", "PASSAGE", "KEYBOARD", "caption_key", "monkey", "PATH"])
@pytest.mark.parametrize(
    "value",
    ["imagenet", "classes", "resnet10", "my-run", "/data/cc12m-0123456789/t.csv", "2026-11-28T20-34-50",
     "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", "ViT-B-16-quickgelu", "20261128T203450Z"],
)  # fmt: skip
def test_a_word_or_a_name_is_no_secret(name: str, value: str) -> None:
    assert not is_secret(name, value)


@pytest.mark.parametrize(
    "part",
    ["://a:", "://a", "?token=", "?token=:", "?a", ";", "authorization:", "authorization: bearer ", "x-", "Cookie: a",
     "cookie: a=", " ", "hf_", "://[", "@", "://a@", "a.", "://'a", "'", "x: \n ", "ab:/", "ab:/c:"],
)  # fmt: skip
def test_a_megabyte_of_anything_is_read_at_once(part: str) -> None:
    text = f"x=://: {part * (1_000_000 // len(part))}"
    for read in (without_secrets, InputError, shortened):
        start = time.process_time()
        read(text)
        assert time.process_time() - start < 1


@pytest.mark.parametrize("length", range(0, 60, 7))
def test_a_long_text_is_cut_without_uncovering_half_a_secret(length: int) -> None:
    remember("the very s3cret words", reference("PW"))
    secret = "the very s3cret words https://me:s3cret@host?token=s3cret "
    text = "a" * length + secret * 2000
    for shown in (str(InputError(text)), shortened(text)):
        assert "s3cr" not in shown
        assert "cret" not in shown
        assert len(shown) < 2000
