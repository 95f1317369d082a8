"""What the report says of one set."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lit_clip.evaluation.overview import (
    COLUMNS,
    STATUSES,
    metric_words,
    number,
    papers_percent,
    percent,
    skipped_of,
    tasks_of,
)
from lit_clip.evaluation.published import PAPER, Published, measured, peers, published
from lit_clip.evaluation.report.html_parts import between, run_image, tree
from lit_clip.tools.html import details, plural, table, thumbnail

TASKS = {**COLUMNS, "geolocation": "nearest neighbour's place", "bias": "bias probe"}
AT_ONCE = 6  # images and pairs that are shown; the others when asked for
LISTED = 50  # skipped images
CONFUSIONS = 20


def section(name: str, entry: Mapping[str, Any], anchor: str, model: str, folder: Path) -> str:
    """The set's part of the page.

    Args:
        name: of the set.
        entry: what ``results.json`` says of it.
        anchor: id of its heading.
        model: the paper's, whose figures stand beside.
        folder: of the run, where images are.
    """
    tasks = tasks_of(entry)
    parts = [f'<h2 id="{anchor}">{escape(name)}</h2>', *_status(entry)]
    if tasks:
        parts.append('<div class="columns">')
        parts.append(f"<div>{_metrics(entry, tasks, model)}</div>")
        parts.append(f"<div>{_facts(entry, tasks)}</div>")
        parts.append("</div>")
    parts += _few_shot(tasks) + _search(tasks)
    zero_shot = tasks.get("zero_shot", {})
    parts += _confusions(zero_shot.get("confusions") or []) + _errors(zero_shot.get("errors") or [], folder)
    if "bias" in tasks:
        parts += [f"<h3>{TASKS['bias']}</h3>", _bias(tasks["bias"])]
    parts += _skipped(entry)
    return "\n".join(parts)


def _status(entry: Mapping[str, Any]) -> Iterator[str]:
    status = entry.get("status") or "done"
    if status != "done":
        words = STATUSES.get(status, str(status))
        yield f'<p><span class="wrong">{escape(words)}</span> {escape(str(entry.get("reason") or ""))}</p>'
    elif entry.get("reason"):  # of a part that was not possible
        yield f'<p class="wrong">{escape(str(entry["reason"]))}</p>'
    if status == "missing" and entry.get("how_to_get"):
        yield f"<p>how to get it: {escape(str(entry['how_to_get']))}</p>"
    if entry.get("note"):
        yield f'<p class="muted">{escape(str(entry["note"]))}</p>'


def _metrics(entry: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]], model: str) -> str:
    """All metrics of all tasks, with the paper's figures and what open_clip measured of the same model."""
    paper = str(entry.get("paper") or "")
    lines = []
    for task, result in tasks.items():
        metrics = result.get("metrics") or {}
        for metric, value in metrics.items():
            main = metric == entry.get("metric")
            of_open_clip = measured(paper, task, model, metric)
            lines.append(
                (
                    f"{TASKS.get(task, task)}, {metric_words(metric)}",
                    percent(number(value)) + (between(result.get("interval")) if main else ""),
                    _with_table(published(paper, task, model, metric)),
                    papers_percent(of_open_clip),
                    *_peers(paper, task, metric),
                )
            )
    lines = [line if len(line) == 5 else (*line, "") for line in lines]
    kept = [place for place in range(5) if place < 2 or any(line[place] for line in lines)]
    head = [
        "metric, %",
        "value, 99.5 % interval" if _has_interval(tasks) else "value",
        "paper",
        "open_clip",
        "others in the paper",
    ]
    right = [kept.index(place) for place in kept if place in (2, 3)]
    return table([[line[place] for place in kept] for line in lines], [head[place] for place in kept], right=right)


def _has_interval(tasks: Mapping[str, Mapping[str, Any]]) -> bool:
    return any(between(task.get("interval")) for task in tasks.values())


def _with_table(figure: Published | None) -> str:
    return f"{papers_percent(figure)} ({figure.source.removeprefix(f'{PAPER}, ')})" if figure else ""


def _peers(paper: str, task: str, metric: str) -> Sequence[str]:
    others = peers(paper, task).items()
    words = [f"{name} {_with_table(figures[metric])}" for name, figures in others if metric in figures]
    return ["; ".join(words)] if words else []


def _facts(entry: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> str:
    facts: list[tuple[str, str]] = []
    for split, counts in (entry.get("splits") or {}).items():
        skipped, absent = len(counts.get("skipped") or []), int(counts.get("absent") or 0)
        also = f", {skipped:,} skipped" if skipped else ""
        also += f", {absent:,} of its list not on disk" if absent else ""
        facts.append((str(split), plural(int(counts.get("images") or 0), "image") + also))
    prompts = entry.get("prompts") or {}
    if prompts:
        words = f"{plural(int(prompts.get('texts') or 0), 'text')} of {prompts.get('classes')} classes"
        facts += [("prompts", words), ("prompts' SHA-256", f"{str(prompts.get('sha256') or '')[:16]}…")]
    predictions = [number(task.get("baseline")) for task in tasks.values()]
    if any(prediction is not None for prediction in predictions):
        facts.append(("baseline", f"{percent(next(g for g in predictions if g is not None))} %"))
    for name, task in tasks.items():
        for key, words in (("captions", "captions"), ("references", "reference images")):
            if key in task:
                facts.append((words, f"{task[key]:,}"))
        if name == "linear_probe":
            facts.append(("regularisation (l2)", f"{number(task.get('l2')) or 0:g}"))
    return table(facts, kind="facts")


def _few_shot(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = tasks.get("few_shot", {}).get("shots") or []
    known = [(shots, [value for value in map(number, values) if value is not None]) for shots, values in lines]
    known = [(shots, values) for shots, values in known if values]
    if not known:
        return []
    draws = plural(max(len(values) for _, values in known), "draw")
    body = [
        [f"mean of {draws}, %", *(percent(sum(values) / len(values)) for _, values in known)],
        ["lowest to highest", *(f"{percent(min(values))} to {percent(max(values))}" for _, values in known)],
    ]
    head = ["examples a class", *(str(shots) for shots, _ in known)]
    return ["<h3>few-shot</h3>", table(body, head, right=range(1, len(head)))]


def _search(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    tried = tasks.get("linear_probe", {}).get("search") or []
    if not tried:
        return []
    lines = [(f"{l2:.3g}", percent(number(score))) for l2, score in tried]
    return [
        details(f"linear probe: {len(tried)} values of l2 tried", table(lines, ["l2", "held out, %"], right=[0, 1]))
    ]


def _confusions(pairs: Sequence[Sequence[Any]]) -> list[str]:
    if not pairs:
        return []
    lines = [list(pair) for pair in pairs[:CONFUSIONS]]
    shown, rest = lines[:AT_ONCE], lines[AT_ONCE:]
    head, right = ["truth", "taken for", "images"], [2]
    parts = ["<h3>confused most often</h3>", table(shown, head, right=right)]
    return [*parts, *([details(f"{len(rest)} more pairs", table(rest, head, right=right))] if rest else [])]


def _errors(errors: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    if not errors:
        return []
    shown, rest = errors[:AT_ONCE], errors[AT_ONCE:]
    parts = ["<h3>most confidently wrong</h3>", _gallery(shown, folder)]
    return [*parts, *([details(f"{len(rest)} more", _gallery(rest, folder))] if rest else [])]


def _gallery(errors: Sequence[Mapping[str, Any]], folder: Path) -> str:
    return '<div class="gallery">\n' + "\n".join(_error(error, folder) for error in errors) + "\n</div>"


def _error(error: Mapping[str, Any], folder: Path) -> str:
    file = run_image(folder, error.get("image"))
    image = f'<img src="{thumbnail(file)}" alt="">' if file else '<span class="none"></span>'
    truth, prediction = str(error.get("truth")), str(error.get("prediction"))
    nearest = error.get("nearest") or [[prediction, error.get("probability")]]
    lines = []
    for name, probability in nearest:
        kind = "truth" if name == truth else "prediction" if name == prediction else ""
        lines.append(
            f'<li class="{kind}"><span>{escape(str(name))}</span><span>{percent(number(probability))}</span></li>'
        )
    caption = f"<b>{escape(truth)}</b><ol>{''.join(lines)}</ol><small>{escape(str(error.get('key')))}</small>"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _bias(result: Mapping[str, Any]) -> str:
    facts = {name: value for name, value in result.items() if not isinstance(value, Mapping)}
    parts = [table(facts.items(), kind="facts")] if facts else []
    trees = {name: value for name, value in result.items() if isinstance(value, Mapping)}
    parts += [details(str(name).replace("_", " "), tree(value)) for name, value in trees.items()]
    return "\n".join(parts)


def _skipped(entry: Mapping[str, Any]) -> list[str]:
    parts = []
    for split, images in skipped_of(entry).items():
        if images:
            of_all = f", the first {LISTED}" if len(images) > LISTED else ""
            title = f"{split}: {plural(len(images), 'image')} could not be read{of_all}"
            parts.append(details(title, table([list(pair) for pair in images[:LISTED]], ["image", "reason"])))
    return parts
