"""What a recipe says about the pictures drawn while a model trains."""

from dataclasses import dataclass

from sfumato.settings import key


@dataclass(frozen=True)
class SampleSettings:
    """The section [sample] of a recipe."""

    every: int = key(500, "steps between pictures; 0 for only at the end", least=0)
    prompts: tuple[str, ...] = key((), "what is drawn; empty: captions of the data, trained and held out")
    negative: str = key("", "what to lean away from; empty: the answer without a prompt")
    steps: int = key(20, "network evaluations a picture takes", least=1)
    guidance: float = key(3.0, "how far to lean towards the prompt; 1 is not at all", least=0)
    seed: int = key(0, "picture i is drawn from seed + i", least=0)
