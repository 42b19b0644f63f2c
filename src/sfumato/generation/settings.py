"""What a recipe says about the pictures drawn while a model trains."""

from dataclasses import dataclass
from typing import Any

from sfumato.settings import key

FORMS = ("cfg", "cfg-zero-star", "apg")
"""Of guidance: `generation.guidance` says what each is."""


@dataclass(frozen=True)
class SampleSettings:
    """The section [sample] of a recipe."""

    every: int = key(500, "steps between pictures; 0 for only at the end", least=0)
    prompts: tuple[str, ...] = key((), "what is drawn; empty: captions of the data, trained and held out")
    negative: str = key("", "what to lean away from; empty: the answer without a prompt")
    steps: int = key(20, "network evaluations a picture takes", least=1)
    guidance: float = key(3.0, "how far to lean towards the prompt; 1 is not at all", least=0)
    guidance_form: str = key("cfg", "how guidance leans", choices=FORMS)
    guidance_rescale: float = key(
        0.0, "share of the contrast guidance added that is taken back", least=0, most=1
    )
    guidance_interval: tuple[float, ...] = key(
        (), "guide only while noise/signal lies between these two; empty: always", numbers=True
    )
    pag_scale: float = key(0.0, "also lean away from the network with disturbed attention", least=0)
    autoguidance_model: str = key("", "a weaker run or model to lean away from", path=True, hub=True)
    seed: int = key(0, "picture i is drawn from seed + i", least=0)

    @property
    def guidance_options(self) -> dict[str, Any]:
        """What is said about how guidance leans, by the names of `GuidanceOptions`; defaults are left out."""
        said = {
            "form": self.guidance_form if self.guidance_form != "cfg" else None,
            "rescale": self.guidance_rescale,
            "interval": list(self.guidance_interval),
            "pag_scale": self.pag_scale,
            "autoguidance_model": self.autoguidance_model,
        }
        return {name: value for name, value in said.items() if value}
