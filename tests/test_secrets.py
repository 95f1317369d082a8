"""Secrets do not reach messages: passwords in addresses, tokens, and variables that a configuration names."""

import pytest

from lit_clip import secrets
from lit_clip.errors import BadSample, InputError
from lit_clip.secrets import plain_without_secrets, reference, remember, remember_environment, without_secrets


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
        "s3://bucket/a@b.jpg",
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
