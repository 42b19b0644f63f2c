"""The command that writes files for elsewhere."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.commands.console import result
from sfumato.commands.early import check_model
from sfumato.errors import Refused, one_of
from sfumato.run_folder import check_output
from sfumato.workflow.export.targets import TARGETS

DTYPES = ("float32", "bfloat16", "float16")

MARKS = ("model_index.json", "sfumato.json", "adapter_config.json", "config.json", "ip-adapter.safetensors")
"""Files that say of a folder that it was exported, or is a model's."""
PUSHED = ("README.md", "images")
"""What --push writes beside the weights."""


def check_replaceable(out: Path) -> None:
    """Raises Refused for a folder that holds other things than an earlier export, which would be lost."""
    held = sorted(one.name for one in out.iterdir()) if out.is_dir() else []
    if any(name in MARKS for name in held):
        return
    if any(is_ours(out / name) for name in held):
        held = [name for name in held if name not in PUSHED]
    for name in held:
        if not name.startswith(".") and not is_ours(out / name):
            raise Refused(
                f'--out: {out} holds other things ("{name}"), and what is exported takes the place of the '
                "whole folder. Choose a folder of its own."
            )


def is_ours(file: Path) -> bool:
    """Whether a file of weights was exported from here."""
    from safetensors import SafetensorError, safe_open

    from sfumato.models.files import HEADER

    if file.suffix != ".safetensors" or not file.is_file():
        return False
    try:
        with safe_open(file, "pt") as opened:
            return HEADER in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


@dataclass(frozen=True)
class Push:
    """What is asked of the Hub: the repository, whether others see it, whether anything is sent now."""

    repo: str = ""
    private: bool = False
    yes: bool = False

    def check(self, to: str) -> None:
        """Raises Refused for options that do not go together."""
        if not self.repo and (self.private or self.yes):
            raise Refused(
                f"--{'private' if self.private else 'yes'} belongs to --push OWNER/NAME. Leave it out."
            )
        if self.repo and to != "diffusers":
            raise Refused(f"--push sends what diffusers loads, not --to {to}. Leave --to out.")


def export(
    run: Path, to: str, out: Path | None, triggers: list[str], dtype: str, as_json: bool, push: Push
) -> None:
    """Write a run for diffusers, ComfyUI or kohya, and say how near the loaded file answers to the run."""
    push.check(to)
    one_of("--dtype", dtype, DTYPES)
    one_of("--to", to, TARGETS)
    check_model(run)
    place = out or Path("runs/export") / f"{run.absolute().name}-{to}"
    check_output(place)
    check_replaceable(place)
    import torch

    from sfumato.workflow.export import export as write

    done = write(run, to, place, triggers, getattr(torch, dtype))
    lines = [str(file) for file in done.files]
    lines.append(f"loaded back: the largest difference is {done.difference:.1e} of the answer's deviation")
    if done.effect:
        lines.append(f"the adapter changes the answer by {done.effect:.1e} of its deviation")
    found = {
        "files": done.files,
        "difference": done.difference,
        "effect": done.effect,
        "metadata": dict(done.metadata),
    }
    if push.repo:
        found["push"], more = send(run, done, place, triggers, push)
        lines += more
    result(found, "\n".join(lines), as_json)


def send(
    run: Path, done: Any, place: Path, triggers: list[str], push: Push
) -> tuple[dict[str, Any], list[str]]:
    """List what would leave and, if that is asked for, send it; (values, lines) to say."""
    from sfumato.hub import size_text
    from sfumato.workflow.export import prepare_upload, upload

    ready = prepare_upload(run, done, place, push.repo, push.private, triggers)
    said: dict[str, Any] = {"repo": push.repo, "private": push.private, "files": dict(ready.files), "url": ""}
    whom = "for you alone" if push.private else "for everybody"
    lines = ["", f"For {push.repo}, {whom}, these {len(ready.files)} files and nothing else:"]
    lines += [f"  {size_text(size):>10}  {name}" for name, size in ready.files.items()]
    if push.yes:
        said["url"] = upload(ready)
        lines.append(f"Sent: {said['url']}")
    else:
        lines.append(f"Nothing was sent. Read {place / 'README.md'}; with --yes they leave.")
    return said, lines
