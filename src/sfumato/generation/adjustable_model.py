"""A loaded model whose weights change in place: LoRAs, how strongly they act, checkpoints, new words."""

import math
from pathlib import Path

from sfumato.errors import Refused
from sfumato.models import Model
from sfumato.models.io.model import load_checkpoint
from sfumato.models.lora import adjustable, key_conversion
from sfumato.models.lora.adjustable import AdjustableFiles
from sfumato.models.pretrained import train_text_encoders


class AdjustableModel(Model):
    """A model to which LoRAs and words are added, and whose run's checkpoints are taken in turn."""

    source: Path | None = None
    """What it was loaded from."""
    lora_scale: float = 1.0
    """How strongly LoRAs act: `set_lora_scale`."""
    adjustable: AdjustableFiles | None = None
    """The LoRA files that were added so that their strength can be changed."""

    def add_lora(
        self, file: Path | str, weight: float = 1.0, expert: str = "", keep_base: bool = False
    ) -> list[str]:
        """Add a LoRA's file (diffusers', ComfyUI's or kohya's names) to the weights; several stack.

        Returns the layers it changed.

        Args:
            expert: high, low or both: for which of two networks (Wan 2.2 A14B) the file is, where neither its
                keys nor its name say so; as FILE@high.
            keep_base: keep a copy of the layers as they were, in the host's memory, so that `set_lora_scale`
                can change the file's weight; it is `weight` times the scale.

        Raises:
            Refused: no such file, or a LoRA of another base.
        """
        if not keep_base:
            return key_conversion.merge(self, file, weight, expert)
        self.adjustable = self.adjustable or AdjustableFiles()
        return self.adjustable.add(self, file, weight, expert, self.lora_scale)

    def set_lora_scale(self, scale: float) -> None:
        """How strongly LoRAs act from now on: the run's own, and files added with `keep_base`, × weight.

        1 is as trained, 0 the base itself, bit for bit; below 0 and above 1 reach further.

        Raises:
            Refused: no number, or no LoRA to scale.
        """
        if not math.isfinite(scale):
            raise Refused(f"lora_scale is {scale}; give a number, as 0.8.")
        adjustable.set_scale(self, self.adjustable or AdjustableFiles(), scale)
        self.lora_scale = scale

    def load_checkpoint(self, folder: Path | str) -> None:
        """Go on with the weights of another checkpoint of the run it was loaded from, read alone.

        Raises:
            Refused: no such checkpoint, or one that does not fit.
        """
        with (self.adjustable or AdjustableFiles()).lifted(self, self.lora_scale):
            load_checkpoint(self, folder)

    def add_embedding(self, file: Path | str, word: str = "") -> str:
        """Teach the text encoders a word from the file of an embedding (textual inversion).

        Returns the word: the one given, else the file's own, else the file's name.

        Raises:
            Refused: no such file, an embedding of another base, a word that is known already.
        """
        return train_text_encoders.add_embedding(self, file, word)
