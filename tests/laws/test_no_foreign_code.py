"""What SECURITY.md promises of files from elsewhere: nothing in them is run."""

import ast
import json
from pathlib import Path

import pytest

import sfumato
from sfumato.errors import Refused
from sfumato.models.control.image_encoders import vision_network
from sfumato.models.text.encoder import TextConditioner

SOURCE = Path(sfumato.__file__).parent


@pytest.fixture
def trap(tmp_path):
    """A transformers folder whose configuration names code of its own, and the file that code would write."""
    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    folder.mkdir()
    (folder / "trap.py").write_text(
        f"from pathlib import Path\nPath({str(sprung)!r}).touch()\nclass Config: ...\nclass Net: ...\n"
    )
    kinds = {"AutoConfig": "trap.Config", "AutoModel": "trap.Net", "AutoTokenizer": ["trap.Net", None]}
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"model_type": "trap", "auto_map": kinds}))
    (folder / "tokenizer.json").write_text("{}")
    return folder, sprung


@pytest.mark.parametrize(
    "load",
    [lambda folder: TextConditioner(str(folder)), vision_network],
    ids=["text encoder", "image encoder"],
)
def test_code_in_an_encoders_folder_is_not_run(load, trap):
    """Law: a folder of transformers is read, never executed."""
    folder, sprung = trap
    with pytest.raises(Refused, match="does not load"):
        load(folder)
    assert not sprung.exists()


def test_code_in_a_pipelines_folder_is_not_run(trap, tmp_path):
    """Law: a folder of diffusers is read, never executed, whatever its index names."""
    folder, sprung = trap
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (pipeline / name).mkdir()
        (pipeline / name / "trap.py").write_text((folder / "trap.py").read_text())
    index = {name: ["trap", "Net"] for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
    (pipeline / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.38.0", **index})
    )
    with pytest.raises(Refused):
        sfumato.load(pipeline)
    assert not sprung.exists()


@pytest.mark.parametrize(
    "file", sorted(SOURCE.rglob("*.py")), ids=lambda file: file.relative_to(SOURCE).as_posix()
)
def test_nothing_unpickles(file):
    """Law: no line of the package opens a pickle, and none lets a folder bring code."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names} | {getattr(node, "module", "") or ""}
            assert not names & {"pickle", "cloudpickle", "dill", "joblib"}, f"{file}:{node.lineno}"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("torch.load", "pickle.load", "pickle.loads"), node.lineno
            for word in node.keywords:
                if word.arg in ("trust_remote_code", "allow_pickle"):
                    assert ast.unparse(word.value) == "False", f"{file}:{node.lineno}"
