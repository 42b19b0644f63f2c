"""The page of a data report: one HTML file, no scripts, no fonts, nothing fetched."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

STYLE = files("sfumato.data").joinpath("report.css").read_text(encoding="utf-8")
MOST_ROWS = 200
MOST_CLASSES = 12


@dataclass(frozen=True)
class Shown:
    """A picture of a contact sheet: thumbnail (WebP, base64), caption, shares of width and height cut off."""

    thumbnail: str
    caption: str
    cut_wide: float = 0.0
    cut_high: float = 0.0


Sheets = Sequence[tuple[str, Sequence[Shown]]]
Twins = Sequence[tuple[str, Sequence[tuple[str, str]]]]


def render(summary: dict[str, Any], sheets: Sheets, twins: Twins = ()) -> str:
    """The whole page as HTML; twins: groups of (thumbnail, name) that are equal or look alike, with why."""
    parts = [
        _head(summary),
        _pictures(summary),
        _clips(summary["clips"]),
        _buckets(summary["bucket_plan"]),
        _words(summary["caption_statistics"], summary["tokens"]),
        _truncated(summary["truncated"]),
        _twins(summary, twins),
        _set_aside(summary["set_aside"]),
        _sheets(sheets, summary["samples"]),
    ]
    name = escape(summary["name"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name} · data</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(parts)}<footer>Written by sfumato data.</footer></main></body></html>\n"
    )


def count(number: int, one: str, many: str = "") -> str:
    """A number of things in words: "1 group", "1,204 groups"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _head(summary: dict[str, Any]) -> str:
    told, tokens = summary["caption_statistics"], summary["tokens"]
    twins = sum(len(group) - 1 for group in summary["equal_pictures"])
    cut = tokens["truncated"] if tokens else 0
    facts = [
        (summary["samples"], "can be used", ""),
        (summary["held_out"], "of them held out", ""),
        (told["different"], "different captions", ""),
        (cut, "captions cut off", "bad" if cut else ""),
        (twins + summary["near_duplicate_pairs"], "equal or alike", "bad" if twins else ""),
        (len(summary["leaks"]), "alike across the split", "bad" if summary["leaks"] else ""),
        (len(summary["set_aside"]), "set aside", "bad" if summary["set_aside"] else ""),
    ]
    cells = "".join(
        f'<div class="{kind}"><b>{value:,}</b><span>{what}</span></div>' for value, what, kind in facts
    )
    return f'<h1>{escape(summary["name"])}</h1><div class="facts">{cells}</div>'


def _bars(title: str, rows: Sequence[Sequence[Any]]) -> str:
    most = max((row[1] for row in rows), default=1)
    bars = "".join(
        f'<div class="bar"><span>{escape(str(label))}</span><i style="width:{100 * number / most:.1f}%"></i>'
        f"<span>{number:,}</span></div>"
        for label, number in rows
    )
    return f'<div class="card"><h3>{title}</h3>{bars}</div>'


def _pictures(summary: dict[str, Any]) -> str:
    kinds = ", ".join(f"{number:,} {escape(kind)}" for kind, number in summary["kinds"].items())
    with_them = [f"{number:,} with {escape(name)}" for name, number in summary["companions"].items()]
    beside = f" Further pictures: {', '.join(with_them)}." if with_them else ""
    labels = summary["labels"]
    title = (
        "Classes" if len(labels) <= MOST_CLASSES else f"The {MOST_CLASSES} largest of {len(labels):,} classes"
    )
    classes = _bars(title, labels[:MOST_CLASSES]) if labels else ""
    common = [[size.replace("x", " × "), number] for size, number in list(summary["sizes"].items())[:10]]
    return (
        f"<h2>Pictures</h2><p>As they are on disk, seen upright: {kinds}, of "
        f"{count(len(summary['sizes']), 'size')}.{beside}</p>"
        f'<div class="two">{_bars("Width over height", summary["aspect"])}'
        f"{_bars('Megapixels', summary['megapixels'])}{_bars('Most frequent sizes', common)}{classes}</div>"
    )


def _clips(told: dict[str, Any] | None) -> str:
    if told is None:
        return ""
    dropped, rate = told["dropped"], told["rate"]
    wanted = f"{told['frames']} frames at {rate:g} a second"
    verdict = (
        f"All of them are long enough for {wanted}."
        if not dropped
        else f"{count(len(dropped), 'is', 'are')} too short for {wanted} and would be dropped."
    )
    listed = _table(("clip", "why it is dropped"), [[one["file"], one["reason"]] for one in dropped])
    details = f"<details><summary>Dropped ({len(dropped):,})</summary>{listed}</details>" if dropped else ""
    return (
        f"<h2>Clips</h2><p>{told['count']:,} of them move, {told['total_seconds']:,.0f} seconds in all; "
        f'the middle frame is shown. {verdict}</p><div class="two">{_bars("Seconds", told["seconds"])}'
        f"{_bars('Frames a second', told['rates'])}"
        f"{_bars(f'Long enough for so many frames at {rate:g}/s', told['long_enough'])}</div>{details}"
    )


def _buckets(plan: dict[str, Any]) -> str:
    largest = max((max(one["width"], one["height"]) for one in plan["buckets"]), default=1)
    rows = "".join(
        f'<tr><td><span class="shape" style="width:{44 * one["width"] / largest:.0f}px;'
        f'height:{44 * one["height"] / largest:.0f}px"></span></td><td>{one["width"]} × {one["height"]}</td>'
        f'<td class="n">{one["pictures"]:,}</td>'
        f'<td class="n">{_share(one["cropped"], ".1%")}</td>'
        f'<td class="n">{_share(one["enlarged"], ".0%")}</td></tr>'
        for one in plan["buckets"]
    )
    return (
        f"<h2>Buckets</h2><p>{_chosen(plan)} {plan['enlarged']:.0%} of the "
        'pictures are smaller than their shape and would be enlarged.</p><div class="card"><table><tr>'
        '<th></th><th>shape</th><th class="n">pictures</th><th class="n">cut off</th>'
        f'<th class="n">enlarged</th></tr>{rows}</table></div>'
    )


def _chosen(plan: dict[str, Any]) -> str:
    """What the plan's shapes are, and how much they cut off."""
    side, cropped = plan["resolution"], f"{plan['cropped']:.1%} of a picture on average"
    if len(plan["buckets"]) == 1:
        return f"One shape for all, {side} × {side}, cuts off {cropped}."
    return (
        f"The {len(plan['buckets'])} shapes of about {side}² pixels that cut least off these pictures: "
        f"{cropped}, against {plan['cropped_by_one_square']:.1%} with one square for all."
    )


def _share(value: float, form: str) -> str:
    """A share as a number and a thin bar."""
    return f'{value:{form}}<s class="share"><i style="width:{100 * value:.1f}%"></i></s>'


def _words(told: dict[str, Any], tokens: dict[str, Any] | None) -> str:
    if not told["different"]:
        return "<h2>Captions</h2><p>There are none.</p>"
    top = max((number for _, number in told["frequent_words"]), default=1)
    words = " ".join(
        f'<span style="font-size:{0.75 + number / top:.2f}em" title="{number:,}">{escape(word)}</span>'
        for word, number in told["frequent_words"]
    )
    repeated = told["most_repeated"]
    again = f" The most repeated, {repeated[1]:,} times: “{escape(repeated[0])}”." if repeated else ""
    read = ""
    if tokens is not None:
        cut = f"{tokens['truncated']:,} ({tokens['share']:.1%}) are longer and cut off"
        read = (
            f" The model reads {tokens['most']} tokens; {cut if tokens['truncated'] else 'none is longer'}."
        )
    counted = (
        _bars("Words in a caption", told["words"])
        if tokens is None
        else _bars("Tokens in a caption", tokens["lengths"])
    )
    return (
        f"<h2>Captions</h2><p>{told['mean_words']:.1f} words on average, {told['longest_words']} at most."
        f"{read}{again}</p>"
        f'<div class="two">{counted}'
        f'<div class="card"><h3>Most frequent words</h3><div class="words">{words}</div></div></div>'
    )


def _truncated(listed: Sequence[Sequence[Any]]) -> str:
    if not listed:
        return ""
    table = _table(("caption", "tokens"), listed)
    return f"<details><summary>Longer than the model reads ({len(listed):,})</summary>{table}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{one}</th>" for one in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows[:MOST_ROWS]
    )
    more = f"<p>… and {len(rows) - MOST_ROWS:,} more.</p>" if len(rows) > MOST_ROWS else ""
    return f'<div class="card"><table><tr>{top}</tr>{body}</table>{more}</div>'


def _pairs(twins: Twins) -> str:
    """Pictures that are equal or look alike, side by side."""
    groups = "".join(
        '<div class="pair"><div>'
        + "".join(f'<img alt="" src="data:image/webp;base64,{data}">' for data, _ in held)
        + f"</div><b>{escape(why)}</b>"
        + "".join(f"<span>{escape(name)}</span>" for _, name in held)
        + "</div>"
        for why, held in twins
    )
    return f'<div class="pairs">{groups}</div>' if groups else ""


def _twins(summary: dict[str, Any], shown: Twins) -> str:
    equal, near, leaks = summary["equal_pictures"], summary["near_duplicates"], summary["leaks"]
    if not (equal or near or leaks):
        return "<h2>Duplicates</h2><p>No two pictures are equal or look alike.</p>"
    parts = [
        f"<h2>Duplicates</h2><p>{count(len(equal), 'group')} of equal pictures and "
        f"{count(summary['near_duplicate_pairs'], 'pair')} that look alike; "
        f"{len(leaks) or 'none'} of all these between training and held-out pictures.</p>",
        _pairs(shown),
    ]
    for title, head, rows in (
        ("Between training and held-out", ("training", "held out", "why"), leaks),
        ("Equal pictures", ("files",), [[", ".join(group)] for group in equal]),
        ("Pictures that look alike", ("one", "other", "difference"), near),
    ):
        if rows:
            parts.append(f"<details><summary>{title} ({len(rows):,})</summary>{_table(head, rows)}</details>")
    return "".join(parts)


def _set_aside(listed: Sequence[dict[str, str]]) -> str:
    if not listed:
        return "<h2>Set aside</h2><p>Nothing: every file found can be used.</p>"
    by_reason: dict[str, list[str]] = {}
    for one in listed:
        by_reason.setdefault(one["reason"], []).append(one["file"])
    ordered = sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))
    rows = [[reason, len(names), _some(names)] for reason, names in ordered]
    every = _table(("file", "reason"), [[one["file"], one["reason"]] for one in listed])
    more = f"<details><summary>Every file ({len(listed):,})</summary>{every}</details>"
    return (
        f"<h2>Set aside</h2><p>{count(len(listed), 'file or row', 'files or rows')} will not be trained on; "
        f"all others will.</p>{_table(('reason', 'number', 'files'), rows)}"
        f"{more if len(rows) < len(listed) else ''}"
    )


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first few names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _sheets(sheets: Sheets, total: int) -> str:
    shown = sum(len(held) for _, held in sheets)
    cut = any(one.cut_wide or one.cut_high for _, held in sheets for one in held)
    veiled = " What their shape cuts off is veiled." if cut else ""
    parts = [f"<h2>Contact sheets</h2><p>{shown:,} of {total:,} pictures, by bucket.{veiled}</p>"]
    for title, held in sheets:
        figures = "".join(
            f"<figure><div><span>{_picture(one)}</span></div>"
            f"<figcaption>{escape(one.caption[:80])}</figcaption></figure>"
            for one in held
        )
        parts.append(f'<h3>{title}</h3><div class="sheet">{figures}</div>')
    return "".join(parts)


def _picture(one: Shown) -> str:
    """The thumbnail, with a veil over what is cut off at either side."""
    sides: tuple[tuple[str, ...], ...] = ()
    if one.cut_wide > 0.005:
        sides = (("left:0", "top:0", "height:100%"), ("right:0", "top:0", "height:100%"))
    elif one.cut_high > 0.005:
        sides = (("top:0", "left:0", "width:100%"), ("bottom:0", "left:0", "width:100%"))
    measure = f"width:{50 * one.cut_wide:.1f}%" if one.cut_wide else f"height:{50 * one.cut_high:.1f}%"
    veils = "".join(f'<i style="{";".join(side)};{measure}"></i>' for side in sides)
    return f'<img alt="" src="data:image/webp;base64,{one.thumbnail}">{veils}'
