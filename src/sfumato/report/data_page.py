"""The page of a data set: what is in it, before anyone trains on it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sfumato.report import page

MOST_CLASSES = 12
MOST_SIZES = 10
SHAPE_PIXELS = 44


class PageThumbnail(Protocol):
    """A picture of a contact sheet: WebP in base64, its caption, shares of width and height cut off."""

    @property
    def thumbnail(self) -> str: ...
    @property
    def caption(self) -> str: ...
    @property
    def cut_wide(self) -> float: ...
    @property
    def cut_high(self) -> float: ...


Sheets = Sequence[tuple[str, Sequence[PageThumbnail]]]
Twins = Sequence[tuple[str, Sequence[tuple[str, str]]]]


def render(summary: Mapping[str, Any], sheets: Sheets, twins: Twins = ()) -> str:
    """The page of a data set, as HTML.

    Args:
        summary: what was counted, as `sfumato data --json` says it.
        sheets: some pictures of each bucket, by its title.
        twins: groups of (thumbnail, name) that are equal or look alike, and why.
    """
    return page.render(
        "data",
        summary["name"],
        f"What there is to train on: {count(summary['samples'], 'sample')}.",
        kicker="sfumato · a data set",
        it=summary,
        facts=_facts(summary),
        pictures=_pictures(summary),
        sizes=[(size.replace("x", " × "), number) for size, number in summary["sizes"].items()][:MOST_SIZES],
        classes=_classes(len(summary["labels"])),
        most_classes=MOST_CLASSES,
        clips=_clips(summary["clips"]),
        dropped=[(one["file"], one["reason"]) for one in (summary["clips"] or {}).get("dropped", ())],
        buckets=_buckets(summary["bucket_plan"]),
        shapes=_shapes(summary["bucket_plan"]["buckets"]),
        captions=_captions(summary["caption_statistics"], summary["tokens"]),
        duplicates=_duplicates(summary),
        twins=twins,
        equal=[[", ".join(group)] for group in summary["equal_pictures"]],
        set_aside=_set_aside(len(summary["set_aside"])),
        reasons=_reasons(summary["set_aside"]),
        aside=[(one["file"], one["reason"]) for one in summary["set_aside"]],
        sheets=sheets,
        sheets_how=_sheets(sheets, summary["samples"]),
    )


def count(number: int, one: str, many: str = "") -> str:
    """A number of things in words: "1 group", "1,204 groups"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    tokens = summary["tokens"]
    twins = sum(len(group) - 1 for group in summary["equal_pictures"])
    cut, leaks, aside = tokens["truncated"] if tokens else 0, len(summary["leaks"]), len(summary["set_aside"])
    facts = [
        ("Samples", summary["samples"], "can be used", False),
        ("Held out", summary["held_out"], "of them", False),
        ("Captions", summary["caption_statistics"]["different"], "different ones", False),
        ("Cut off", cut, "captions the model reads in part", cut),
        ("Duplicates", twins + summary["near_duplicate_pairs"], "equal or alike", twins),
        ("Leaks", leaks, "alike across the split", leaks),
        ("Set aside", aside, "files or rows", aside),
    ]
    return [(name, f"{number:,}", note, "bad" if is_bad else "") for name, number, note, is_bad in facts]


def _pictures(summary: Mapping[str, Any]) -> str:
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in summary["kinds"].items())
    with_them = ", ".join(f"{number:,} with {name}" for name, number in summary["companions"].items())
    beside = f" Further pictures: {with_them}." if with_them else ""
    return f"As they are on disk, seen upright: {kinds}, of {count(len(summary['sizes']), 'size')}.{beside}"


def _classes(number: int) -> str:
    return "Classes" if number <= MOST_CLASSES else f"The {MOST_CLASSES} largest of {number:,} classes"


def _clips(clips: Mapping[str, Any] | None) -> str:
    if clips is None:
        return ""
    dropped, wanted = clips["dropped"], f"{clips['frames']} frames at {clips['rate']:g} a second"
    verdict = (
        f"All of them are long enough for {wanted}."
        if not dropped
        else f"{count(len(dropped), 'is', 'are')} too short for {wanted} and would be dropped."
    )
    seconds = f"{clips['total_seconds']:,.0f} seconds in all"
    return f"{clips['count']:,} of them move, {seconds}; the middle frame is shown. {verdict}"


def _buckets(plan: Mapping[str, Any]) -> str:
    """What the plan's shapes are, how much they cut off, and how many pictures they enlarge."""
    side, cropped = plan["resolution"], f"{plan['cropped']:.1%} of a picture on average"
    enlarged = f"{plan['enlarged']:.0%} of the pictures are smaller than their shape and would be enlarged."
    if len(plan["buckets"]) == 1:
        return f"One shape for all, {side} × {side}, cuts off {cropped}. {enlarged}"
    return (
        f"The {len(plan['buckets'])} shapes of about {side}² pixels that cut least off these pictures: "
        f"{cropped}, against {plan['cropped_by_one_square']:.1%} with one square for all. {enlarged}"
    )


def _shapes(buckets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The buckets, each with the pixels that its outline takes on the page."""
    largest = max((max(one["width"], one["height"]) for one in buckets), default=1)
    return [
        {
            **one,
            "wide": round(SHAPE_PIXELS * one["width"] / largest),
            "high": round(SHAPE_PIXELS * one["height"] / largest),
        }
        for one in buckets
    ]


def _captions(captions: Mapping[str, Any], tokens: Mapping[str, Any] | None) -> str:
    if not captions["different"]:
        return "There are none."
    read, again = "", ""
    if tokens is not None:
        cut = f"{tokens['truncated']:,} ({tokens['share']:.1%}) are longer and cut off"
        read = (
            f" The model reads {tokens['most']} tokens; {cut if tokens['truncated'] else 'none is longer'}."
        )
    if captions["most_repeated"]:
        text, number = captions["most_repeated"]
        again = f" The most repeated, {number:,} times: “{text}”."
    return f"{captions['mean_words']:.1f} words on average, {captions['longest_words']} at most.{read}{again}"


def _duplicates(summary: Mapping[str, Any]) -> str:
    equal, pairs, leaks = summary["equal_pictures"], summary["near_duplicate_pairs"], summary["leaks"]
    if not (equal or pairs or leaks):
        return "No two pictures are equal or look alike."
    return (
        f"{count(len(equal), 'group')} of equal pictures and {count(pairs, 'pair')} that look alike; "
        f"{len(leaks) or 'none'} of all these between training and held-out pictures."
    )


def _set_aside(number: int) -> str:
    if not number:
        return "Nothing: every file found can be used."
    return f"{count(number, 'file or row', 'files or rows')} will not be trained on; all others will."


def _reasons(listed: Sequence[Mapping[str, str]], most: int = 3) -> list[tuple[str, str, str]]:
    """Why files were set aside, the most frequent reason first: (reason, number, some of the files)."""
    found: dict[str, list[str]] = {}
    for one in listed:
        found.setdefault(one["reason"], []).append(one["file"])
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        (
            reason,
            f"{len(names):,}",
            ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else ""),
        )
        for reason, names in ordered
    ]


def _sheets(sheets: Sheets, total: int) -> str:
    shown = sum(len(held) for _, held in sheets)
    cut = any(one.cut_wide or one.cut_high for _, held in sheets for one in held)
    veiled = " What their shape cuts off is veiled." if cut else ""
    return f"{shown:,} of {total:,} pictures, by bucket.{veiled}"
