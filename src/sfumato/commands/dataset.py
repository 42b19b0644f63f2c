"""The command about data: what is in a set, and what is wrong with it."""

from pathlib import Path

from ..record import write_atomic
from .console import progress, result


def data(folder: str, captions: str, out: Path, as_json: bool) -> None:
    """Write a page about a data set; files that were set aside are named, and are no failure."""
    from ..data import sources
    from ..data.report import report

    with progress() as shown:
        found = report(sources.open(folder, captions=captions, empty=True), progress=shown)
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.html"
    write_atomic(page, found.page())
    aside = found.summary["set_aside"]
    lines = [f"{name:<12} {found.summary[name]:,}" for name in ("samples", "captions", "train", "held_out")]
    lines.append(f"{'sizes':<12} {_sizes(found.summary['sizes'])}")
    lines.append(f"{'set aside':<12} {len(aside):,}")
    lines += [f"  {one['file']}: {one['reason']}" for one in aside]
    result({**found.summary, "page": page}, "\n".join([*lines, str(page)]), as_json)


def _sizes(sizes: dict[str, int], most: int = 5) -> str:
    shown = [f"{size} ({count:,})" for size, count in list(sizes.items())[:most]]
    return ", ".join(shown) + (f" and {len(sizes) - most} more" if len(sizes) > most else "")
