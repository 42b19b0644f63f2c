"""The page of a data report: one HTML file, no scripts, no fonts, nothing fetched."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

STYLE = files("sfumato.data").joinpath("report.css").read_text(encoding="utf-8")
MOST_ROWS = 200


Sheets = Sequence[tuple[str, Sequence[tuple[str, str]]]]
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


def _head(summary: dict[str, Any]) -> str:
    told = summary["caption_statistics"]
    twins = sum(len(group) - 1 for group in summary["equal_pictures"])
    facts = [
        (summary["samples"], "pictures that can be used", ""),
        (summary["held_out"], "of them held out", ""),
        (told["different"], "different captions", ""),
        (len(summary["sizes"]), "different sizes", ""),
        (twins + summary["near_duplicate_pairs"], "equal or alike", "bad" if twins else ""),
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
    common = [[size.replace("x", " × "), number] for size, number in list(summary["sizes"].items())[:10]]
    return (
        "<h2>Pictures</h2><p>As they are on disk, seen upright.</p>"
        f'<div class="two">{_bars("Width over height", summary["aspect"])}'
        f"{_bars('Megapixels', summary['megapixels'])}{_bars('Most frequent sizes', common)}</div>"
    )


def _clips(told: dict[str, Any] | None) -> str:
    if told is None:
        return ""
    dropped, rate = told["dropped"], told["rate"]
    wanted = f"{told['frames']} frames at {rate:g} a second"
    verdict = (
        f"All of them are long enough for {wanted}."
        if not dropped
        else f"{len(dropped):,} are too short for {wanted} and would be dropped."
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
        f"<h2>Buckets</h2><p>The {len(plan['buckets'])} shapes of about {plan['resolution']}² pixels that "
        f"cut least off these pictures: {plan['cropped']:.1%} of a picture on average, against "
        f"{plan['cropped_by_one_square']:.1%} with one square for all. {plan['enlarged']:.0%} of the "
        'pictures are smaller than their shape and would be enlarged.</p><div class="card"><table><tr>'
        '<th></th><th>shape</th><th class="n">pictures</th><th class="n">cut off</th>'
        f'<th class="n">enlarged</th></tr>{rows}</table></div>'
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
        f"<h2>Duplicates</h2><p>{len(equal):,} groups of equal pictures, "
        f"{summary['near_duplicate_pairs']:,} pairs that look alike, "
        f"{len(leaks):,} of all these between training and held-out pictures.</p>",
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
    rows = [[one["file"], one["reason"]] for one in listed]
    return (
        f"<h2>Set aside</h2><p>{len(rows):,} files or rows will not be trained on; all others will.</p>"
        f"{_table(('file', 'reason'), rows)}"
    )


def _sheets(sheets: Sequence[tuple[str, Sequence[tuple[str, str]]]], total: int) -> str:
    shown = sum(len(held) for _, held in sheets)
    parts = [f"<h2>Contact sheets</h2><p>{shown:,} of {total:,} pictures, by bucket.</p>"]
    for title, held in sheets:
        figures = "".join(
            f'<figure><div><img alt="" src="data:image/webp;base64,{data}"></div>'
            f"<figcaption>{escape(caption[:80])}</figcaption></figure>"
            for data, caption in held
        )
        parts.append(f'<h3>{title}</h3><div class="sheet">{figures}</div>')
    return "".join(parts)
