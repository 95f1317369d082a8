"""Interface of a recipe: it chooses settings of ``fit`` that the user has not set, from the data and the model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.parts import qualified_name

POSITIVES = {"class_path": "lit_clip.losses.Contrastive", "init_args": {"duplicates": "positives"}}
MOST_ROWS, FEW_ROWS = 20_000, 1_000  # that are looked at: where images have names, and where they have to be read


class Choice(NamedTuple):
    """A setting chosen by a recipe."""

    option: str  # as typed, without dashes: ``model.optimizer.lr``, ``trainer.callbacks.EMA.decay``
    value: Any  # plain
    why: str = ""  # a few words for the table
    unless: Sequence[str] = ()  # other options that say the same: if one of them is given, this is not chosen


class Facts(NamedTuple):
    """Numbers of the training data."""

    pairs: int  # of an epoch; with ``captions.per_image: together`` its images
    images: int  # distinct
    captions: int  # distinct
    validation: int = 0  # pairs to validate
    digest: str = ""  # of the pairs


@dataclass(eq=False)
class Run:
    """A run before its start, as a recipe sees it. Data and model are created on first use.

    Args:
        given: settings on the command line and in YAML files, by the names that are typed.
        make_data: creates the data module, with its sources opened.
        make_module: creates the :class:`lit_clip.LitCLIP`.
        seconds: seconds since the command began.
        seed: of the run.
        world: number of ranks.
    """

    given: Mapping[str, Any]
    make_data: Callable[[], Any]
    make_module: Callable[[], Any]
    seconds: Callable[[], float] = lambda: 0.0
    seed: int = 0
    world: int = 1

    @cached_property
    def data(self) -> Any:
        """The data module."""
        return self.make_data()

    @cached_property
    def module(self) -> Any:
        """The module, on the CPU."""
        return self.make_module()

    @property
    def per_image(self) -> str:
        """The captions of an image in an epoch: ``data.captions.per_image``."""
        return getattr(getattr(self.data, "captions", None), "per_image", "all")

    @cached_property
    def facts(self) -> Facts:
        """Numbers of the training data; for large data, estimated from the first rows."""
        train, val = self.data.train_source, self.data.val_source
        names = train.image_names()
        rows = min(len(train), MOST_ROWS if names is not None else FEW_ROWS)
        images, captions = set(), set()
        for row in range(rows):
            try:
                images.add(train.image_identity(row) if names is None else str(names[row]))
                captions.update(train.captions(row))
            except ValueError:  # a bad sample, which the run skips or refuses
                continue
        share = len(train) / max(1, rows)
        found = round(len(images) * share), round(len(captions) * share)
        return Facts(
            train.pairs_per_epoch, *found, len(val), hex_digest([len(train), *sorted(map(str, images | captions))])
        )

    def count(self, option: str) -> int | None:
        """Return a given count; None if it is not given, or without a limit (-1)."""
        value = self.given.get(option)
        return value if type(value) is int and value > 0 else None

    @property
    def given_batch(self) -> int | None:
        """Pairs per step over all ranks, if given."""
        of_rank = self.count("data.batch_size")
        return self.count("data.global_batch_size") or (of_rank and of_rank * self.world)

    def steps_per_epoch(self, batch: int) -> int:
        """Return the steps of an epoch, from the number of pairs per step over all ranks."""
        order = getattr(self.data, "batch_order", None)  # without duplicates
        return order.batches(batch) if order else max(1, self.facts.pairs // batch)

    def divisible(self, batch: int) -> int:
        """Return a number of pairs per step that all ranks can share: at most ``batch``, but at least one each."""
        return max(self.world, batch // self.world * self.world)

    def is_given(self, *options: str) -> bool:
        """Return whether the user has set one of these options, a part of one, or the option above one.

        ``model.freeze`` is given by ``model.freeze.image``, and ``model.loss.duplicates`` by ``model.loss``. But
        ``--model my_clip.Cautious`` and ``--data my_data.Prompts`` name a class, and set none of its options.
        """
        return any(
            ("." in name and f"{option}.".startswith(f"{name}.")) or f"{name}.".startswith(f"{option}.")
            for option in options
            for name in self.given
        )


class Recipe(ABC):
    """Choose settings that neither the command line nor a YAML file sets. Subclass it for your own recipe.

    The settings are parsed as if they had been typed, shown in a table with reasons before the plan, and saved in the
    run's ``fit_config.yaml``, which names no recipe: a run is resumed with the settings that it began with.
    """

    measures = False  # whether choices depend on time or on training; they are then kept for the same command

    @abstractmethod
    def choose(self, run: Run) -> list[Choice]:
        """Return the choices, a pure function of the run. Choices of given settings are ignored."""

    def choose_without_pairs(self, run: Run) -> list[Choice]:
        """Return the choices for a data module without pairs; their number is then unknown."""
        return []

    def choices(self, run: Run) -> list[Choice]:
        """Return the choices of settings that are not given."""
        chosen = self.choose(run) if hasattr(run.data, "sources") else self.choose_without_pairs(run)
        return [each for each in chosen if not run.is_given(each.option, *each.unless)]

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{qualified_name(type(self)).rpartition('.')[2]}({settings})"
