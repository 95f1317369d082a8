"""``lit-clip evaluate``: evaluate a model on a suite of sets, as the paper does."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from lit_clip import distributed, load_model
from lit_clip.commands.class_sources import NAMES_ALONE, ClassOptions
from lit_clip.embedding.encode import EncodingSettings, claimed_by_first
from lit_clip.errors import InputError, require
from lit_clip.evaluation.class_metrics import metrics_typed
from lit_clip.evaluation.classification import ClassHead, TaskOptions
from lit_clip.evaluation.comparison import OtherRun, other_runs, paired_differences, seed_groups
from lit_clip.evaluation.few_shot import SHOTS
from lit_clip.evaluation.report.page import write_report
from lit_clip.evaluation.report.results_table import print_results
from lit_clip.evaluation.report.tables import write_tables, write_tensorboard
from lit_clip.evaluation.results import Results, provenance
from lit_clip.evaluation.run import EvaluationRun
from lit_clip.evaluation.store import FeatureStore
from lit_clip.evaluation.suite import TASKS, SuiteEntry, Task, read_suite
from lit_clip.tools.atomic import make_folder
from lit_clip.tools.console import stderr
from lit_clip.tools.hashing import sha256_of_file

ENCODING = EncodingSettings()


def evaluate(
    *,
    model: str,
    suite: list[str],
    output: str,
    data_root: str = ".",
    sets: list[str] | None = None,
    tasks: list[str] | None = None,
    metrics: list[str] | None = None,
    compare: list[str] | None = None,
    cache: str | None = None,
    head: ClassOptions = NAMES_ALONE,
    encoding: EncodingSettings = ENCODING,
    shots: list[int] | None = None,
    draws: int = 3,
    seed: int = 0,
    download: bool = False,
) -> None:
    """Evaluate a model on a suite of sets: zero-shot, linear probe, few-shot, retrieval, caption choice, segmentation.

    Sets that are not below the data root are listed with how to get them; the others are evaluated. Features and
    results are cached: the same command resumes after an interruption.

    Args:
        model: a checkpoint, a weights file, or a name that lit_clip.load_model accepts.
        suite: YAML files of sets, or names of packaged ones (lit-clip configs lists them).
        output: folder for results.json, report.html, results.csv, results.tex, predictions, images and TensorBoard
            curves.
        data_root: folder that the sets' paths are relative to.
        sets: names of the sets to evaluate; all if not given.
        tasks: tasks to run, of zero_shot, linear_probe, few_shot, head, retrieval, image_retrieval,
            document_retrieval, geolocation, bias, caption_choice, segmentation, pointing; all if not given, head with
            --head.
        metrics: further metrics of zero-shot and linear probe as NAME=CLASS_PATH, of torchmetrics or of your own, such
            as auroc=torchmetrics.classification.MulticlassAUROC.
        compare: results.json of other runs, or their folders, to compare with; NAME=PATH names a run, and runs with
            one name are seeds of one recipe (this: of the evaluated model's).
        cache: folder for image and text features; cache in the output folder if not given.
        encoding: how images and texts are encoded.
        head: also evaluate this head, a file of classify --save_head, on the sets of its classes.
        shots: numbers of examples per class of the few-shot results; 1, 2, 4, 8 and 16 if not given.
        draws: number of draws of the examples of each few-shot result.
        seed: random seed of the draws and of held-out images.
        download: first download the missing sets that torchvision or the Hugging Face hub has.
    """
    require(draws >= 1, f"--draws {draws} must be at least 1")
    require(min(shots or SHOTS) >= 1, f"--shots {min(shots or SHOTS)} must be at least 1")
    options = TaskOptions(tuple(shots or SHOTS), draws, seed, metrics=metrics_typed(metrics or []))
    wanted = _tasks(tasks, head.path)
    entries = _chosen(read_suite(suite), sets, wanted)
    others = other_runs(compare or [], Path(output))
    clip, out = load_model(model), Path(output)
    if (found := head.opened()) is not None:
        found.check(clip, head.path)
        own = ClassHead(found.facts.names, found, found.facts.several, sha256_of_file(Path(head.path)))
        options = replace(options, head=own)
    make_folder(out, "--output")
    store = FeatureStore(clip, Path(cache) if cache else out / "cache", encoding)
    run = EvaluationRun(clip, store, Path(data_root), Results(out), options, wanted)
    source = provenance(model, clip, store.fingerprint, encoding.precision, suite)
    if options.head:
        source |= {"head": {"path": head.path, "sha256": options.head.sha256}}
    with claimed_by_first(out, encoding):
        run.evaluate(entries, download)
        if not distributed.rank_and_world()[0]:
            _write_reports(run.results, source, others)
            absent = [name for name in entries if run.results.sets[name]["status"] == "missing" and not download]
            if count := sum(bool(entries[name].download) for name in absent):
                stderr().print(f"{count} of the missing sets can be downloaded with --download")
            _raise_failures(run.results.sets, data_root)


def _write_reports(results: Results, source: dict[str, Any], others: Mapping[str, OtherRun]) -> None:
    folder, groups = results.folder, seed_groups(others)
    differences = paired_differences({**source, "sets": results.sets}, folder, others)
    compared = {"comparisons": [asdict(each) for each in differences]} if others else {}
    written, runs = results.write({**source, **compared}), {name: run.results for name, run in others.items()}
    write_report(written, folder, runs, groups, differences)
    write_tables(written, folder, runs, groups)
    write_tensorboard(written, folder)
    print_results(written)
    stderr().print(f"{folder / 'results.json'} and {folder / 'report.html'}")


def _chosen(
    entries: dict[str, SuiteEntry], names: Sequence[str] | None, tasks: Sequence[Task]
) -> dict[str, SuiteEntry]:
    """Return the named sets that have one of the tasks; a head's task is one of every set with classes."""
    for name, entry in entries.items() if "head" in tasks else ():
        if "zero_shot" in (entry.tasks or ()) and "head" not in (entry.tasks or ()):
            entries[name] = replace(entry, tasks=[*(entry.tasks or ()), "head"])
    unknown = [name for name in names or [] if name not in entries]
    require(not unknown, f"--sets: no {', '.join(unknown)} in the suite; there are {', '.join(entries)}")
    named = {name: entry for name, entry in entries.items() if not names or name in names}
    chosen = {name: entry for name, entry in named.items() if set(tasks) & set(entry.tasks or ())}
    require(bool(chosen), f"--tasks {' '.join(tasks)}: not a task of any of the sets {', '.join(named)}")
    return chosen


def _tasks(names: Sequence[str] | None, head: str) -> tuple[Task, ...]:
    unknown = [name for name in names or [] if name not in get_args(Task)]
    require(not unknown, f"--tasks: there is no {', '.join(unknown)}; there are {', '.join(TASKS)}")
    require(bool(head) or "head" not in (names or ()), "--tasks head: needs --head, a file of classify --save_head")
    return tuple(task for task in TASKS if (not names or task in names) and (head or task != "head"))


def _raise_failures(sets: Mapping[str, Mapping[str, Any]], data_root: str) -> None:
    """Raise an error for failed sets after everything is written, so that scripts notice incomplete results."""
    failed = {name: found["reason"] for name, found in sets.items() if found["status"] == "failed"}
    if failed:
        name, reason = next(iter(failed.items()))
        more = f" (and {len(failed) - 1} more sets failed)" if len(failed) > 1 else ""
        raise InputError(f"{name}: {reason}{more}")
    if all(found["status"] == "missing" for found in sets.values()):
        first = next(iter(sets.values()))["reason"]
        raise InputError(
            f"--data_root {data_root}: none of {len(sets)} sets is there ({first}); the report says how to get them"
        )
