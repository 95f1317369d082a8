"""The precision of the commands that compute features: what a device cannot do is said before anything is computed."""

import pytest
import torch

from lit_clip.embedding import precision
from lit_clip.embedding.precision import autocast, check_precision
from lit_clip.errors import InputError


@pytest.mark.parametrize(("has_instructions", "lines"), [(True, 0), (False, 1), (None, 0)])
def test_emulated_bfloat16_is_one_line(
    has_instructions: bool | None, lines: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(precision, "computes_in_bfloat16", lambda accelerator: has_instructions)
    check_precision("32-true", "cpu")
    assert not recwarn
    check_precision("bf16-mixed", "cpu")
    assert len(recwarn) == lines
    assert all("--precision bf16-mixed: emulated on this processor" in str(each.message) for each in recwarn)


@pytest.mark.parametrize(
    ("accelerator", "device", "refused"),
    [("cpu", "cuda", True), ("auto", "cpu", True), ("auto", "cuda", False), ("gpu", "cuda", False)],
)
def test_float16_is_refused_where_the_cpu_computes(
    accelerator: str, device: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "best_device", lambda: torch.device(device))
    if not refused:
        check_precision("16-mixed", accelerator)
        return
    with pytest.raises(InputError, match="--precision 16-mixed: needs a GPU; on a CPU use 32-true"):
        check_precision("16-mixed", accelerator)


def test_float32_leaves_a_trainers_autocast_as_it_is() -> None:
    cpu = torch.device("cpu")
    with torch.autocast("cpu", torch.bfloat16), autocast(cpu, "32-true"):
        assert torch.is_autocast_enabled("cpu")
    with autocast(cpu, "bf16-mixed"):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
