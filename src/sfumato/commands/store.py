"""The command about a store: what is in it, who needs it, and what may go."""

from pathlib import Path
from typing import Any

from sfumato.commands.console import result, say
from sfumato.workflow.store_gc import collect_garbage

UNITS = ("bytes", "KB", "MB", "GB", "TB")


def store(root: Path, keep: list[Path], days: float, remove: bool, as_json: bool) -> None:
    """Say what a store holds, and take out what nobody needs if `remove` says so."""
    found = collect_garbage(root, keep, days, remove)
    lines = [f"{root}"]
    for kind in ("pixels", "text"):
        share = found[kind]
        lines.append(
            f"  {kind:<8}{share['entries']:>10,} entries {size(share['bytes']):>10},  "
            f"needed by nobody: {share['unused_entries']:,} ({size(share['unused_bytes'])})"
        )
        if share["damaged"]:
            lines.append(f"  {share['damaged']} damaged shards of {kind}; the next encode repairs them")
    lines.append(_folders("codecs", found["codecs"]))
    if found["rings"]:
        lines.append(_folders("rings", found["rings"]))
    lines += [f"  passed by: {one['file']}: {one['reason']}" for one in found["passed_by"]]
    if found["leftover_bytes"]:
        lines.append(f"  left by killed writers: {size(found['leftover_bytes'])}")
    for user in found["users"]:
        state = "running now" if user["busy"] else "kept" if user["kept"] else "gone, not kept"
        lines.append(f"  {state}: {user['owner']} {user['part']}".rstrip())
    if remove:
        lines.append(f"Freed {size(found['freed_bytes'])}.")
    else:
        lines.append(f"--collect would free {size(found['unused_bytes'])}.")
        say(f"Kept is what existing runs need, what --keep names, and what is younger than {days:g} days.")
    result({"store": str(root), **found}, "\n".join(lines), as_json)


def _folders(what: str, found: list[dict[str, Any]]) -> str:
    unused = [one for one in found if not one["kept"]]
    held, freed = (size(sum(one["bytes"] for one in some)) for some in (found, unused))
    return f"  {what:<8}{len(found):>10,} folders {held:>10},  needed by nobody: {len(unused):,} ({freed})"


def size(count: float) -> str:
    """Bytes in words: "3.2 GB"."""
    unit = 0
    while count >= 1000 and unit < len(UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} bytes" if not unit else f"{count:.3g} {UNITS[unit]}"
