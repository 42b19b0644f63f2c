"""What the demo can show, readable without loading what shows it."""

TASKS = {
    "text": ("openmoji", "openmoji-all", "shapes"),
    "controlnet": ("shapes",),
    "ip-adapter": ("shapes-reference",),
    "edit": ("shapes-edit",),
    "video": ("moving-shapes",),
}
"""Task → the embedded sets it can be shown on, its own first. `demo/<task>.py` holds its `TASK`."""
