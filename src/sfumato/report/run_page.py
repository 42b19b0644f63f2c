"""A run's page: its pictures, its curves, its recipe, in one file that needs nothing else.

It reads the run folder only (recipe, events, pictures), so it can be written at any moment of a run.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sfumato.report import curves, page
from sfumato.report.page import Picture, amount, duration, embedded_from
from sfumato.report.run_events import readable_events
from sfumato.run_folder import RunFolder, write_atomic

Event = dict[str, Any]
GROUPS = {
    "trained": ("Captions it was trained on", "drawn again from noise"),
    "held_out": ("Captions it never saw", "put together from what it learned elsewhere"),
    None: ("Prompts", ""),
    "judged": ("Captions it was trained on", "chosen at random, from noise it never met"),
    "judged_held_out": ("Captions it never saw", "that no training picture had"),
}
JUDGED = "judged"
"""Groups of this beginning are what a number was taken from; they have a section of their own."""
SHARES = {
    "trained": ("Trained captions", "pictures right"),
    "held_out": ("Unseen captions", "pictures right"),
    "shape_and_color": ("Shape and color", "right, unseen captions"),
    "position": ("Position", "right, unseen captions"),
    "shape": ("Shape", "right, unseen captions"),
    "color": ("Color", "right, unseen captions"),
    "direction": ("Direction", "right, unseen captions"),
    "all": ("All of them", "right at once"),
    "reader": ("The reader", "right on clean drawings"),
    "outline_iou": ("Outlines", "overlap (IoU), unseen captions"),
    "reference_color": ("Reference's color", "right, unseen combinations"),
    "edit_done": ("Edits", "done, unseen combinations"),
    "kept_iou": ("What was to stay", "overlap (IoU) with the source"),
    "steadiness": ("Steadiness", "change from frame to frame, drawn and real"),
}
MOST_STEPS, MOST_ROWS = 9, 8


def write(run: RunFolder | Path | str) -> Path:
    """Write the run's report.html from what its folder holds.

    Returns:
        The page's path.
    Raises:
        Refused: if it is no run folder, or not writable.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    write_atomic(folder.report, render(folder))
    return folder.report


def render(run: RunFolder) -> str:
    """The page of a run, as HTML."""
    events, unreadable = readable_events(run)
    odd = [f"{unreadable:,} lines of events.jsonl are none that a run writes; they are left out."]
    phases = _phases(events)
    large, small = curves.losses(events)
    return page.render(
        "run",
        run.path.name,
        _lead(events),
        kicker="sfumato · a run",
        facts=[fact for fact in _facts(events) if fact[1]],
        drawn=_latest(run, events, judged=False),
        drawn_how=_drawn_how(events),
        strips=_strips(run, events),
        judged=_latest(run, events, judged=True),
        judged_how=_judged_how(events),
        large=large,
        small=small,
        measured=_measured(events),
        data=_data(events),
        set_aside=_set_aside(events),
        phases=phases if sum(seconds for _, seconds in phases) > 0 else [],
        recipe=_recipe(run),
        notes=[event["text"] for event in of_kind(events, "note") if event.get("text")]
        + odd * bool(unreadable),
    )


def of_kind(events: Iterable[Event], kind: str) -> list[Event]:
    """The events of one kind, in order."""
    return [event for event in events if event.get("kind") == kind]


def _last(events: Iterable[Event], kind: str) -> Event:
    found = of_kind(events, kind)
    return found[-1] if found else {}


def _lead(events: list[Event]) -> str:
    start, stop = _last(events, "start"), _last(events, "stop")
    parts = []
    if start.get("device"):
        precision = f" in {start['precision']}" if start.get("precision") else ""
        threads = f", {start['threads']} threads" if start.get("threads") and start["device"] == "cpu" else ""
        many = start.get("processes") or 1
        shared = f"{many} processes ({start.get('parallel', 'copies')}), " if many > 1 else ""
        parts.append(f"On {shared}{start['device']}{precision}{threads}.")
    if stop:
        finished = stop.get("reason") in ("done", "finished", "complete", None)
        words = "Finished" if finished else f"Stopped ({stop['reason']})"
        parts.append(f"{words} at step {stop.get('step', '?')}.")
    return " ".join(parts)


def _facts(events: list[Event]) -> list[tuple[str, str, str]]:
    steps, start = of_kind(events, "step"), _last(events, "start")
    held_out = [event for event in of_kind(events, "validation") if event.get("split") == "held_out"]
    parameters, data = start.get("parameters"), _last(events, "data").get("summary", {})
    seconds = sum(value for _, value in _phases(events))
    facts = [
        ("Pictures", amount(data["samples"]) if data.get("samples") else "", _less(data)),
        ("Parameters", amount(_total(parameters)) if parameters else "", "of the denoiser"),
        ("Steps", amount(steps[-1]["step"]) if steps else "", _rate(steps)),
        ("Held-out loss", f"{held_out[-1]['loss']:.4f}" if held_out else "", _error(held_out)),
        ("Time", duration(seconds) if seconds else "", "all phases"),
    ]
    judged = _last(events, "demo_evaluation")
    for name, value in (judged.get("accuracy") or {}).items():
        if isinstance(value, int | float):
            words, note = SHARES.get(name, (_words(name), "judged right"))
            facts.append((words, f"{value:.0%}", note))
    return facts


def _total(parameters: Any) -> float:
    """A count of parameters; of a table of counts the trained ones, else the denoiser's."""
    if isinstance(parameters, dict):
        return parameters.get("trained", parameters.get("denoiser", sum(parameters.values())))
    return parameters


def _less(data: Event) -> str:
    held_out, aside = data.get("held_out"), data.get("set_aside")
    aside = len(aside) if isinstance(aside, list) else aside
    notes = [f"{held_out:,} held out" if held_out else "", f"{aside:,} set aside" if aside else ""]
    return ", ".join(note for note in notes if note)


def _rate(steps: list[Event]) -> str:
    rates = sorted(event["samples_per_second"] for event in steps if event.get("samples_per_second"))
    return f"{amount(rates[len(rates) // 2])} samples/s" if rates else ""


def _error(held_out: list[Event]) -> str:
    return f"± {held_out[-1]['error']:.2g}" if held_out and held_out[-1].get("error") else ""


def _drawn_by_group(events: list[Event]) -> dict[str | None, list[Event]]:
    """Events that drew pictures, by group, each in order of steps."""
    found: dict[str | None, list[Event]] = {}
    for event in of_kind(events, "pictures"):
        found.setdefault(event.get("group"), []).append(event)
    order = [group for group in GROUPS if group in found] + [group for group in found if group not in GROUPS]
    return {group: sorted(found[group], key=lambda event: event.get("step") or 0) for group in order}


def _group(group: str | None) -> tuple[str, str]:
    return GROUPS.get(group, (_words(str(group)), ""))


def _heading(group: str | None, shown: Iterable[str] = ()) -> dict[str, str]:
    """A group's name, and as its note what it is and what stands before each drawing."""
    name, note = _group(group)
    name = name.replace("Captions", "Samples") if shown else name
    before = ", ".join(map(_shown_name, shown)) + " → drawn" * bool(shown)
    return {"name": name, "note": "; ".join(one for one in (note, before) if one)}


def _shown_name(name: str) -> str:
    return {"image": "source"}.get(name, name.replace("_", " "))


def _guides(run: RunFolder, event: Event, index: int) -> list[tuple[str, str]]:
    """What guided a drawing of an event, each (what it is, address)."""
    shown = event.get("shown") or {}
    found = [
        (_shown_name(what), embedded_from(run.path, files[index]))
        for what, files in shown.items()
        if index < len(files)
    ]
    return [one for one in found if one[1]]


def _drawn_how(events: list[Event]) -> str:
    steps = [event.get("step") or 0 for event in of_kind(events, "pictures")]
    return f"Pictures after step {max(steps):,}; click one to see it large." if steps else ""


def _judged_how(events: list[Event]) -> str:
    notes = _notes_of(_last(events, "demo_evaluation"))
    return ". ".join(f"{_words(name)}: {note}" for name, note in notes.items())


def _notes_of(event: Event) -> dict[str, str]:
    """How each number of an event was taken."""
    notes = event.get("notes") or {}
    return notes if isinstance(notes, dict) else {}


def _latest(run: RunFolder, events: list[Event], judged: bool) -> list[dict[str, Any]]:
    """The groups drawn last, each its heading and its pictures."""
    found = []
    for group, drawn in _drawn_by_group(events).items():
        if (group or "").startswith(JUDGED) != judged:
            continue
        last = drawn[-1]
        prompts, seeds = last.get("prompts") or [], last.get("seeds") or []
        pictures = [
            Picture(
                embedded_from(run.path, file),
                prompts[index] if index < len(prompts) else "",
                f"seed {seeds[index]}" if index < len(seeds) else "",
                _guides(run, last, index),
            )
            for index, file in enumerate(last.get("files", ()))
        ]
        if any(one.address for one in pictures):
            found.append({**_heading(group, last.get("shown") or ()), "pictures": pictures})
    return found


def _strips(run: RunFolder, events: list[Event]) -> list[dict[str, Any]]:
    """For each group a table: a row for each prompt, a column for each step."""
    found = []
    for group, drawn in _drawn_by_group(events).items():
        if len(drawn) < 2:
            continue
        chosen = _evenly_spaced(drawn, MOST_STEPS)
        prompts, shown = chosen[-1].get("prompts") or [], chosen[-1].get("shown") or ()
        rows = []
        for row in range(min(len(chosen[-1].get("files", ())), MOST_ROWS)):
            words = prompts[row] if row < len(prompts) else ""
            cells = [
                {"address": address, "words": what} for what, address in _guides(run, chosen[-1], row)
            ] + [_cell(run, event, row, words) for event in chosen]
            rows.append({"words": words, "cells": cells})
        columns = [*map(_shown_name, shown), *(f"{event.get('step') or 0:,}" for event in chosen)]
        found.append({**_heading(group, shown), "columns": columns, "rows": rows})
    return found


def _cell(run: RunFolder, event: Event, row: int, words: str) -> dict[str, str]:
    files = event.get("files", ())
    address = embedded_from(run.path, files[row]) if row < len(files) else ""
    return {"address": address, "words": f"{words} (step {event.get('step') or 0:,})"}


def _evenly_spaced(items: list[Event], most: int) -> list[Event]:
    """At most `most` of the items, spread evenly, first and last among them."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _measured(events: list[Event]) -> list[tuple[str, str, str]]:
    """Metrics of evaluation events; a value may carry an error."""
    rows = []
    for event in of_kind(events, "evaluation") + of_kind(events, "demo_evaluation"):
        metrics, notes = {**event.get("metrics", {}), **(event.get("accuracy") or {})}, _notes_of(event)
        for name, value in metrics.items():
            if isinstance(value, dict) and "value" in value:
                error = f" ± {value['error']:.2g}" if value.get("error") is not None else ""
                rows.append((_words(name), f"{value['value']:.4g}{error}", value.get("note", "")))
            elif isinstance(value, int | float):
                rows.append((_words(name), f"{value:.4g}", notes.get(name, "")))
    return rows


def _data(events: list[Event]) -> list[tuple[str, str]]:
    """What is said of the data, each (name, value)."""
    data = _last(events, "data").get("summary", {})
    words = []
    for name, value in data.items():
        if isinstance(value, int | float | str) and name not in ("content", "pixels"):
            words.append((_words(name), amount(value) if not isinstance(value, str) else value))
    sizes = data.get("sizes") or {}
    if isinstance(sizes, dict):
        words += [(f"sized {size}", amount(count)) for size, count in list(sizes.items())[:12]]
    return words


def _set_aside(events: list[Event]) -> list[tuple[str, str]]:
    """Files that were not trained on, and why."""
    data = _last(events, "data").get("summary", {})
    aside = (
        data.get("set_aside")
        if isinstance(data.get("set_aside"), list)
        else of_kind(events, "damaged_checkpoint")
    )
    return [(one.get("file", ""), one.get("reason", "")) for one in aside or []]


def _phases(events: list[Event]) -> list[tuple[str, float]]:
    """Seconds of each phase, phases of one name added up."""
    found: dict[str, float] = {}
    for event in of_kind(events, "phase"):
        found[event["name"]] = found.get(event["name"], 0.0) + float(event.get("seconds", 0.0))
    return list(found.items())


def _recipe(run: RunFolder) -> list[tuple[str, list[tuple[str, str, str]], list[str]]]:
    """The effective recipe: each section's name, its rows (key, value, origin), and their classes."""
    if not run.effective.is_file():
        return []
    sections: dict[str, list[tuple[str, str, str]]] = {"": []}
    name = ""
    for line in run.effective.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("["):
            name = line.strip("[] ")
        elif " = " in line:
            key, _, rest = line.partition(" = ")
            value, mark, origin = rest.rpartition(" # ")
            sections.setdefault(name, []).append((key, value if mark else rest, origin if mark else ""))
    return [
        (title or "run", rows, ["dim" if origin == "default" else "" for _, _, origin in rows])
        for title, rows in sections.items()
        if rows
    ]


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").capitalize()
