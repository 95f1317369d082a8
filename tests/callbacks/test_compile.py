"""``torch.compile`` changes the speed and nothing else."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from callbacks import ActivationCheckpointing, Compile
from callbacks.compile import compile_blocks
from lit_clip import LitCLIP, load_model
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, ResNetConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.models.packing import pack

CONFIG = CLIPConfig(
    16,
    VisionTransformerConfig(image_size=32, patch_size=16, width=32, layers=2, heads=1),
    TextTransformerConfig(context_length=40, vocab_size=50, width=32, layers=2, heads=1),
)


def batch(longest: int) -> CaptionBatch:
    generator = torch.Generator().manual_seed(longest)
    tokens = torch.randint(1, 49, (4, longest), generator=generator)
    tokens[0, -1] = tokens[1, longest // 2] = tokens[2:, 1] = 49
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return CaptionBatch(images, tokens, list("abcd"))


def gradients(model: CLIP, longest: int) -> dict[str, Tensor]:
    model.zero_grad()
    pairs = batch(longest)
    (model.encode_image(model.normalize(pairs.images)) * model.encode_text(pairs.tokens)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_a_compiled_model_has_the_gradients_and_names_of_a_plain_one() -> None:
    torch.manual_seed(0)
    plain = CLIP(CONFIG).double()
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, backend="eager")
    compile_blocks(compiled, backend="eager")  # setup is called for each stage
    assert list(compiled.state_dict()) == list(plain.state_dict())
    blocks: list[Any] = [*compiled.visual.transformer.resblocks, *compiled.transformer.resblocks]  # type: ignore
    assert all(block._compiled_call_impl is not None for block in blocks)
    graphs = torch._dynamo.utils.counters["stats"]
    for longest in (5, 9, 16, 33):
        torch.testing.assert_close(gradients(compiled, longest), gradients(plain, longest), rtol=1e-10, atol=1e-12)
    known = graphs["unique_graphs"]
    for longest in (3, 7, 12, 15, 35, 40):  # rows are as long for any texts
        gradients(compiled, longest)
    assert graphs["unique_graphs"] == known


@pytest.mark.slow
def test_training_and_validation_stay_compiled_for_any_length() -> None:
    """Blocks of both encoders are one function to torch, which compiles at most 8 graphs of it by default."""
    torch._dynamo.reset()
    model = CLIP(replace(CONFIG, text=replace(CONFIG.text, context_length=77)))
    compile_blocks(model, backend="eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for rows, length in itertools.product((4, 3), (10, 70)):
            pairs = batch(length)
            images, tokens = model.normalize(pairs.images)[:rows], pairs.tokens[:rows]
            with torch.inference_mode():
                model.eval().encode_image(images), model.encode_text(tokens)  # noqa: B018  # only to compile
            (model.train().encode_image(images) * model.encode_text(tokens)).sum().backward()


def test_batch_norm_with_activation_checkpointing_is_refused() -> None:
    resnet = replace(CONFIG, image=ResNetConfig((1, 1, 1, 1), 16, 32))
    both: list[Callback] = [Compile(), ActivationCheckpointing()]
    with pytest.raises(InputError, match=r"callbacks\.Compile: cannot keep BatchNorm's statistics"):
        both[0].setup(Trainer(callbacks=both, logger=False), LitCLIP(resnet), "fit")
    both[0].setup(Trainer(callbacks=both, logger=False), LitCLIP(CONFIG), "fit")


def text_batch(seed: int, count: int = 16) -> tuple[Tensor, list[int]]:
    """Captions of 15 tokens on average whose longest has 15 to 77."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=generator)
    longest = int(torch.randint(15, 78, (), generator=generator))
    lengths = (2.62 + 0.45 * normal).exp().round().clamp(5, longest).long().tolist()
    lengths[seed % count] = longest
    tokens = torch.randint(1, 49, (count, longest), generator=generator)
    tokens[torch.arange(count), torch.tensor(lengths) - 1] = 49
    return tokens, lengths


def text_clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(replace(CONFIG, text=TextTransformerConfig(77, 50, 32, layers=2, heads=2))).double()


def test_a_block_of_rows_is_one_graph_without_a_break() -> None:
    torch._dynamo.reset()
    tokens, lengths = text_batch(0)
    model = text_clip()
    packing = pack(lengths, tokens.device, 80)
    x = torch.randn(len(packing.rows), 32, dtype=torch.double)
    for arguments in ((x, packing.layout), (x, packing.layout, packing.ends)):
        explained = torch._dynamo.explain(model.transformer.resblocks[0])(*arguments)
        assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.slow
def test_compiled_texts_stay_packed_and_share_a_constant_number_of_graphs() -> None:
    torch._dynamo.reset()
    plain = text_clip()
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, backend="eager")
    computed: list[int] = []
    compiled.transformer.register_forward_hook(lambda _, args, __: computed.append(len(args[0])))
    graphs, counts = torch._dynamo.utils.counters["stats"], []
    batches = [text_batch(seed, count=32) for seed in range(9)]
    assert len({max(lengths) for _, lengths in batches}) > 6
    for tokens, lengths in batches:
        with torch.no_grad():
            compiled.encode_text(tokens, lengths=lengths)
        features = compiled.encode_text(tokens, lengths=lengths)
        features.sum().backward()
        torch.testing.assert_close(features, plain.encode_text(tokens, lengths=lengths), rtol=1e-12, atol=1e-12)
        counts.append(graphs["unique_graphs"])
    assert counts[1:] == counts[1:2] * 8
    assert not torch._dynamo.utils.counters["graph_break"]
    texts = sum(sum(lengths) for _, lengths in batches)
    assert texts >= 0.9 * sum(computed[1::2])
    assert sum(computed[1::2]) < 77 * 32 * 9 / 4  # of the padded form


@pytest.mark.slow  # half a minute of compiling
def test_compiled_and_plain_runs_end_with_the_same_weights_and_resume_from_each_other(
    caption_table: Path, tmp_path: Path
) -> None:
    from lightning.pytorch import seed_everything

    from datamodules import Captions

    def run(name: str, compile: bool, steps: int, start: Path | None = None) -> Path:
        seed_everything(0)
        module = LitCLIP(CLIPConfig(16, CONFIG.image, TextTransformerConfig(40, 49408, 32, 2, 1)))
        data = Captions(str(caption_table), str(caption_table), batch_size=4, num_workers=0)
        trainer = Trainer(
            callbacks=[Compile()] if compile else [],
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, data, ckpt_path=start, weights_only=True)
        path = tmp_path / f"{name}.ckpt"
        trainer.save_checkpoint(path)
        return path

    plain, compiled = run("plain", False, 2), run("compiled", True, 2)
    models = [load_model(path).state_dict() for path in (plain, compiled)]
    torch.testing.assert_close(models[1], models[0], rtol=1e-3, atol=1e-5)
    longer = [run("a", True, 4, plain), run("b", False, 4, compiled)]
    models = [load_model(path).state_dict() for path in longer]
    torch.testing.assert_close(models[1], models[0], rtol=1e-3, atol=1e-4)
