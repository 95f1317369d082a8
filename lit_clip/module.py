"""LitCLIP with its training step (Radford et al. 2021, figure 3: encode, loss, log) and its validation."""

from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from torch import Tensor

from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.losses.contrastive import at_least_float32
from lit_clip.losses.loss import Loss, evaluate_loss
from lit_clip.losses.pairwise import default_loss
from lit_clip.models.config import CLIPConfig, Size
from lit_clip.models.finetuning import Freeze
from lit_clip.models.lora import LoRA
from lit_clip.models.rates import Rates
from lit_clip.retrieval.retrieval_set import MEAN_RECALL, RetrievalSet, token_hashes
from lit_clip.training.even_batches import placeholder
from lit_clip.training.micro_batches import encode_pairs, encode_step
from lit_clip.training.optimizers import EXCEPT_GAINS_AND_BIASES, Decays, Optimization, OptimizerFactory, PaperAdamW
from lit_clip.training.run_hooks import RunHooks
from lit_clip.training.schedules import ScheduleFactory, WarmupCosine
from lit_clip.weights.checkpoints import saved_settings, typed_settings
from lit_clip.weights.load import create_model, whole_name


class Features(TypedDict):
    """Result of a validation step: unit features ``[B, D]`` of images and captions, and the pairs' tokens and keys."""

    image: Tensor
    text: Tensor
    tokens: Tensor
    keys: list[str]


class TrainingStep(NamedTuple):
    """Results of the current training step, detached, for callbacks.

    Keys, unit features ``[B, D]`` and scalar loss are those of this rank; ``pairs`` is the number of all ranks' pairs.
    """

    keys: list[str]
    image: Tensor
    text: Tensor
    loss: Tensor
    pairs: int


class LitCLIP(RunHooks):
    """Train a :class:`lit_clip.CLIP` on pairs of images and captions.

    A checkpoint holds the model under OpenAI's key names and the architecture as plain values, so
    ``LitCLIP.load_from_checkpoint(path)`` and open_clip read it unchanged.

    Args:
        architecture: a name from :func:`lit_clip.list_models`, or a configuration; None: the one of ``pretrained``, or
            ViT-B-32 without it.
        pretrained: weights to start from: anything :func:`lit_clip.load_model` opens, of this architecture.
        image_size: if other than the architecture's; the position embedding of ``pretrained`` is interpolated.
        context_length: if other than the architecture's, see :func:`lit_clip.load_model`.
        loss: the training loss. None: :class:`lit_clip.losses.Sigmoid` for a model with a ``logit_bias`` (SigLIP),
            otherwise :class:`lit_clip.losses.Contrastive`. ``val/loss`` is this default for every training loss, so
            that runs can be compared.
        optimizer: creates the optimiser of parameter groups: a class of ``torch.optim`` or ``timm.optim``, one's own,
            or a ``functools.partial`` of it.
        lr_scheduler: creates the learning rate's schedule of the optimiser; it is stepped after each optimiser step,
            and one with an argument ``total_steps`` gets the number of steps of the run.
        decay: which parameters have weight decay, by name.
        freeze: encoders, or all but their last blocks, heads and temperature, that are not in the optimiser and always
            in evaluation mode; and whether BatchNorm keeps its statistics.
        rates: learning rate and weight decay of encoders, heads, temperature and layers, as factors of the optimiser's.
        lora: train low-rank additions to the blocks that are not frozen in place of their encoders, both or one. A
            checkpoint then holds only what is trained and the name of the base weights (``pretrained``).
        micro_batch_size: most pairs of this rank that are encoded at once, while the loss sees all pairs of all ranks
            (GradCache, Gao et al. 2021). Activations of all but the last are computed again in the backward pass, so
            activations take the memory of one micro-batch; loss and gradients are the whole batch's. Only
            BatchNorm sees the micro-batches.

    Attributes:
        last_step: the training step under way; None if no rank had a pair.
    """

    def __init__(
        self,
        architecture: str | CLIPConfig | None = None,
        pretrained: str | Path | None = None,
        image_size: Size | None = None,
        context_length: int | None = None,
        loss: Loss | None = None,
        optimizer: OptimizerFactory = PaperAdamW,
        lr_scheduler: ScheduleFactory = WarmupCosine,
        decay: Decays = EXCEPT_GAINS_AND_BIASES,
        freeze: Freeze | None = None,
        rates: Rates | None = None,
        lora: LoRA | None = None,
        micro_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"image_size": image_size, "context_length": context_length}
        given = {"freeze": freeze, "rates": rates, "lora": lora, **sizes, "micro_batch_size": micro_batch_size}
        settings = typed_settings(given, "model")
        if loss is not None and not isinstance(loss, Loss):
            instead = "pass an object of a subclass of lit_clip.losses.Loss, as Contrastive()"
            raise InputError(f"model.loss: {loss!r} is no loss; {instead}")
        self.optimization = Optimization(optimizer, lr_scheduler, decay, settings["rates"])
        self.model = create_model(architecture, pretrained, image_size, context_length)
        self.loss = default_loss(self.model) if loss is None else loss
        self.starts_trained = pretrained is not None
        self._freeze(settings["freeze"] or Freeze(), settings["lora"])
        base = whole_name(architecture, pretrained) if settings["lora"] and pretrained else None
        saved = saved_settings(self.model, settings, sizes, base)
        self.save_hyperparameters(saved | {"micro_batch_size": micro_batch_size})
        self.last_step: TrainingStep | None = None

    def forward(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        """Return unit features ``[B, D]`` of images and captions, float32."""
        return encode_pairs(self.model, batch)

    def training_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        counts = self.begin_step(batch)
        pairs = encode_step(self.model, batch, counts, self.hparams["micro_batch_size"])
        zero = self.zero_loss(pairs.image, pairs.text)
        self.last_step = None
        if self.step_skipped:  # begin_step has seen that no rank has a pair
            return zero
        loss, metrics = evaluate_loss(self.loss, pairs)
        loss = loss + zero
        self.log_step({"loss": loss, **metrics}, counts.pairs.world)
        self.log("train/logit_scale", pairs.scale)
        self.last_step = TrainingStep(
            batch.keys, pairs.image.detach(), pairs.text.detach(), loss.detach(), counts.pairs.total
        )
        return loss

    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> Features:
        tokenizer = self.model.tokenizer  # hash before encoding: afterwards it would wait for the device
        hashes = token_hashes(batch.tokens, tokenizer.context_length, tokenizer.pad_id)
        features = self.predict_step(batch, batch_idx)
        self._validated.add(features["image"], features["text"], batch.keys, hashes)
        return features

    def test_step(self, batch: CaptionBatch, batch_idx: int) -> Features:
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: CaptionBatch, batch_idx: int) -> Features:
        pairs = batch.pairs
        image_BD, text_BD = (features[:pairs] for features in self(batch if pairs else placeholder(self.model, batch)))
        return Features(image=image_BD, text=text_BD, tokens=batch.tokens, keys=batch.keys)

    def on_validation_epoch_start(self) -> None:
        self._validated = RetrievalSet()
        super().on_validation_epoch_start()

    def on_validation_epoch_end(self) -> None:
        self._log_retrieval("val")

    def on_test_epoch_end(self) -> None:
        self._log_retrieval("test")

    def _log_retrieval(self, prefix: str) -> None:
        """Log loss and retrieval over the whole set, independent of batch size and number of ranks."""
        scale = self.model.logit_scale.exp()
        empty = at_least_float32(scale.new_zeros(0, self.model.config.embed_dim))  # as features are
        evaluation = self._validated.evaluate(empty, scale, self.model.logit_bias)
        for name, value in evaluation.metrics.items():
            # Already over all ranks: Lightning's means would weight uneven ranks and batches wrongly.
            self.log(f"{prefix}/{name}", value, prog_bar=name in ("loss", MEAN_RECALL))
        self.baselines |= {f"{prefix}/{name}": value for name, value in evaluation.baselines.items()}
        self.alike = evaluation.alike

    def configure_optimizers(self) -> Any:
        return self.optimization.configure(self.optimization.groups(self), self.trainer)
