"""``lit-clip export --push``: against a server that speaks the hub's protocol, and opened from there again."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from torch import Tensor

from lit_clip import load_model
from lit_clip.commands.export import export
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig
from tests.helpers.exports import TEXTS, checkpoint
from tests.helpers.hub import Hub, Repository, running_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub where a token may write as ``us``."""
    with running_hub() as server:
        constants = "huggingface_hub.constants"
        monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)  # a second protocol for the content
        monkeypatch.setenv("HF_TOKEN", "may-write")
        server.writers["may-write"] = {"us"}
        yield server


@pytest.fixture
def ours(tmp_path: Path, tiny_config: CLIPConfig) -> CLIP:
    return checkpoint(tiny_config, tmp_path / "last.ckpt")


def push(tmp_path: Path, name: str = "us/tiny", format: Any = "open_clip", **options: Any) -> None:
    export(str(tmp_path / "last.ckpt"), format=format, output=str(tmp_path / "out"), push=name, **options)


def refused(tmp_path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        push(tmp_path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def features(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return model.encode_image(pixels), model.encode_text(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["open_clip", "hugging_face"])
def test_a_pushed_model_opens_by_name_with_the_same_features_and_in_the_library_it_is_for(
    format: str, hub: Hub, ours: CLIP, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(tmp_path, format=format, license="mit", private=True)
    assert hub.repositories["us/tiny"].private
    tokens = ours.tokenize(TEXTS)
    expected = features(ours, tokens)
    for name in ("us/tiny", "hf-hub:us/tiny"):
        opened = load_model(name)
        assert torch.equal(opened.tokenize(TEXTS), tokens)
        for found, wanted in zip(features(opened, tokens), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    if format == "open_clip":
        theirs, _ = open_clip.create_model_from_pretrained("hf-hub:us/tiny")
        found = features(theirs.eval(), tokens)
    else:
        model = transformers.CLIPModel.from_pretrained("us/tiny").eval()
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        out = model.get_image_features(pixels), model.get_text_features(tokens)
        found = tuple(getattr(each, "pooler_output", each) for each in out)
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each, wanted, rtol=0, atol=1e-4)
    output = capsys.readouterr()
    assert f"uploaded: {hub.url}/us/tiny" in output.out


def test_the_hub_shows_the_card_and_its_code_opens_the_model(hub: Hub, ours: CLIP, tmp_path: Path) -> None:
    push(tmp_path, license="mit")
    card = ModelCard.load("us/tiny")
    assert card.data.to_dict() == {
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip"],
        "license": "mit",
    }
    card.validate()
    names: dict[str, Any] = {}
    exec(card.text.split("```python\n")[1].split("```")[0], names)
    assert torch.equal(names["tokenizer"](TEXTS), ours.tokenize(TEXTS))
    assert 'lit_clip.load_model("us/tiny")' in card.text


@pytest.mark.usefixtures("ours")
def test_pushing_again_replaces_the_files_in_a_new_commit(hub: Hub, tmp_path: Path) -> None:
    push(tmp_path)
    first = hub.repositories["us/tiny"].branches["main"]
    export(str(tmp_path / "last.ckpt"), format="open_clip", output=str(tmp_path / "2"), push="us/tiny", license="mit")
    repository = hub.repositories["us/tiny"]
    assert repository.branches["main"] != first
    assert b"license: mit" in repository.commits[repository.branches["main"]]["README.md"]
    assert repository.commits[first].keys() == repository.commits[repository.branches["main"]].keys()


@pytest.mark.usefixtures("ours")
def test_a_repository_with_other_files_is_left_alone_and_nothing_is_written(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["us/tiny"] = Repository()
    before = hub.repositories["us/tiny"].push({"thesis.pdf": b"", ".gitattributes": b""})
    assert refused(tmp_path).startswith(
        "--push us/tiny: holds other files than this format's (thesis.pdf); name another"
    )
    assert hub.repositories["us/tiny"].branches["main"] == before
    assert not (tmp_path / "out").exists()
    assert not any(request.startswith("POST") for request in hub.requests)


@pytest.mark.usefixtures("hub")
def test_without_a_token_nothing_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert refused(tmp_path) == "--push us/tiny: no token of the hub; run hf auth login"


@pytest.mark.parametrize("name", ["tiny", "us/tiny/2", "us/t ny"])
@pytest.mark.usefixtures("hub")
def test_what_cannot_be_a_repository_is_refused_before_the_model_is_opened(name: str, tmp_path: Path) -> None:
    assert refused(tmp_path, name=name).startswith(f"--push {name}: ")


def test_a_public_repository_does_not_get_what_should_be_private(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["us/tiny"] = Repository()
    hub.repositories["us/tiny"].push({})
    assert "--push us/tiny: is public, and --private is for new repositories" in refused(tmp_path, private=True)
    with pytest.raises(InputError, match="--private: belongs to --push"):
        export("last.ckpt", format="open_clip", output=str(tmp_path / "out"), private=True)


@pytest.mark.usefixtures("ours")
def test_a_token_without_the_right_or_of_nobody_is_one_line_and_the_export_stays(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = f"the export is complete in {tmp_path / 'out'}: hf upload them/tiny {tmp_path / 'out'} . uploads it"
    advice = "your token may not write there; run hf auth login with a token that may, or name a repository of your own"
    assert refused(tmp_path, name="them/tiny") == f"--push them/tiny: {advice}; {left}"
    assert (tmp_path / "out/README.md").is_file()
    assert "them/tiny" not in hub.repositories
    monkeypatch.setenv("HF_TOKEN", "nobody's")
    (tmp_path / "out").rename(tmp_path / "first")
    assert "--push us/tiny: the hub does not accept your token; run hf auth login; the export" in refused(tmp_path)


@pytest.mark.usefixtures("ours")
def test_a_token_that_the_hub_repeats_is_not_printed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = f"hf_{'a1' * 17}"

    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError(f"no quota for {token}, sent as Authorization: Bearer {token}")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", refuse)
    message = refused(tmp_path)
    assert "no quota for hf_***, sent as Authorization: " in message
    assert token not in message


@pytest.mark.usefixtures("ours")
def test_a_licence_that_the_hub_does_not_know_is_refused_before_anything_is_uploaded(hub: Hub, tmp_path: Path) -> None:
    message = '--push us/tiny: the hub refuses the model card ("license" must be one of [apache-2.0, mit, ...])'
    assert refused(tmp_path, license="my own") == f"{message}; nothing was written"
    assert not hub.repositories
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ours")
def test_a_commit_of_somebody_else_during_the_upload_is_not_overwritten(hub: Hub, tmp_path: Path) -> None:
    push(tmp_path)
    (tmp_path / "out").rename(tmp_path / "first")
    theirs: list[str] = []
    hub.on_upload = lambda: theirs.append(hub.repositories["us/tiny"].push({"README.md": b"theirs"}))
    assert "--push us/tiny: has changed meanwhile; look at it and upload again; the export is" in refused(tmp_path)
    assert hub.repositories["us/tiny"].branches["main"] == theirs[-1]


@pytest.mark.usefixtures("ours")
def test_an_interrupted_upload_changes_nothing_and_the_line_says_how_to_go_on(hub: Hub, tmp_path: Path) -> None:
    hub.on_upload = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="us/tiny: the upload is not complete; .* hf upload us/tiny") as caught:
        push(tmp_path, private=True)
    assert str(caught.value).endswith("uploads it, with --private")
    repository = hub.repositories["us/tiny"]
    assert [*repository.commits[repository.branches["main"]]] == [".gitattributes"]
    assert (tmp_path / "out/open_clip_model.safetensors").is_file()


def test_an_unreachable_hub_is_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert refused(tmp_path).startswith("--push us/tiny: cannot be looked up (")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "--push us/tiny: cannot be looked up (" in refused(tmp_path)
