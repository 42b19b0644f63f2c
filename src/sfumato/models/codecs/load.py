"""A codec from a folder, whoever wrote it."""

from pathlib import Path

from sfumato.errors import Refused
from sfumato.models.codecs.image import AutoencoderCodec
from sfumato.models.codecs.video import VIDEO_AUTOENCODERS, VideoAutoencoderCodec
from sfumato.models.files import read_json, verify_checksums
from sfumato.models.interface import Codec
from sfumato.models.load_network import check_size, load_network
from sfumato.models.stage_folder import load_stage


def load_codec(folder: Path) -> Codec:
    """A codec from a folder: a stage of ours, a model's, or diffusers' AutoencoderKL or AutoencoderTiny."""
    verify_checksums(folder)
    for place in (folder, folder / "codec"):
        if (place / "stage.json").is_file():
            stage = load_stage(place)
            if isinstance(stage, Codec):
                return stage
            raise Refused(f"{place} holds a {stage.kind}, not a codec.")
    config = dict(read_json(folder / "config.json")) if (folder / "config.json").is_file() else {}
    architecture = config.get("_class_name")
    if architecture in (*VIDEO_AUTOENCODERS, "AutoencoderKL", "AutoencoderTiny"):
        import diffusers

        check_size(getattr(diffusers, architecture), folder)
    if architecture in VIDEO_AUTOENCODERS:
        made = VideoAutoencoderCodec(architecture, **{k: v for k, v in config.items() if k[0] != "_"})
        weights = load_network(type(made.network), folder)
        made.network.load_state_dict(weights.state_dict())
        made.measure()
        return made.eval()
    if architecture not in ("AutoencoderKL", "AutoencoderTiny"):
        raise Refused(
            f'model.codec = "{folder}" is no codec: it needs stage.json (sfumato) or the config.json of '
            "diffusers' AutoencoderKL or AutoencoderTiny, or of one of its video autoencoders "
            f"({', '.join(VIDEO_AUTOENCODERS)}). Or say auto, kl, tiny or pixels."
        )
    codec = AutoencoderCodec(architecture, **{k: v for k, v in config.items() if not k.startswith("_")})
    fill_network = load_network(type(codec.network), folder)
    codec.network.load_state_dict(fill_network.state_dict())
    codec.shift.fill_(config.get("shift_factor") or 0.0)
    codec.scale.fill_(1.0 / (config.get("scaling_factor") or 1.0))
    return codec.eval()
