"""What a recipe says about training: how long, in what steps, and what is kept."""

from collections.abc import Mapping
from dataclasses import dataclass

from sfumato.settings import Table, key

OPTIMIZERS = (
    "adamw",
    "adafactor",
    "lion",
    "muon",
    "prodigy",
    "schedule-free",
    "came",
    "ademamix",
    "adamw-8bit",
    "lion-8bit",
    "adamw-paged",
    "adamw-8bit-paged",
)
"""What `optim.optimizers` has a table of, which is not asked: a recipe is read without torch."""
DENSITIES = ("uniform", "logit-normal", "log-normal", "log-snr", "cosmap", "mode")
WEIGHTINGS = ("none", "min-snr", "edm", "sigmoid", "p2", "debiased")


@dataclass(frozen=True)
class TrainSettings:
    """The section [train] of a recipe."""

    steps: int = key(5000, "optimizer steps in all; with train.minutes the most there may be", least=1)
    minutes: float = key(
        0.0,
        "what the run may take, a codec and encodings included: the clock decides how many steps fit and the "
        "learning rate's schedule with them; 0: train.steps decides",
        least=0,
    )
    min_steps: int = key(0, "with train.minutes: so many steps at least, however long they take", least=0)
    batch: int = key(32, "samples in one step, over all processes and accumulation", least=1)
    gradient_accumulation: int = key(1, "parts a batch is computed in, to need less memory", least=1)
    sequence_packing: bool = key(
        False,
        "our DiT: samples of all buckets in one step, their tokens in one sequence",
    )
    parallel: str = key(
        "auto",
        "how processes share the run: ddp, copies; fsdp, divided among all; hsdp, among a machine's",
        choices=("auto", "ddp", "fsdp", "hsdp"),
    )
    hsdp_shard_size: int = key(0, "hsdp: processes that share one copy; 0: those of a machine", least=0)
    context_parallel: int = key(
        1, "so many processes share each sample's tokens: long clips, large pictures", least=1
    )
    exact_elastic: bool = key(False, "end with the same bits on 1, 2, 4, ... processes")
    elastic_max_ranks: int = key(4, "exact_elastic only: most processes it may run on; a power of 2", least=1)
    optimizer: str = key("adamw", "what moves the weights", choices=OPTIMIZERS)
    learning_rate: float = key(1e-4, "the optimizer's learning rate after warm-up", least=0)
    text_learning_rate: float = key(
        0.0, "that of text encoders and new words, where they are trained; 0: train.learning_rate", least=0
    )
    warmup_steps: int = key(100, "steps in which the learning rate rises from 0", least=0)
    lr_schedule: str = key(
        "constant",
        "the learning rate after warm-up",
        choices=("constant", "cosine", "linear", "wsd", "rex"),
    )
    weight_decay: float = key(0.01, "decay of matrices; vectors never decay", least=0)
    lr_multipliers: Mapping[str, float] = key(
        Table(),
        "weights that learn at another rate, by patterns of their names; the first that matches counts: "
        '"blocks.*" = 0.5',
        values=float,
        least=0,
        example="blocks.*=0.5",
    )
    max_grad_norm: float = key(1.0, "largest norm of the gradient; 0 leaves it alone", least=0)
    ema: float = key(0.999, "decay of the averaged weights; 0 keeps none", least=0, most=1)
    ema_snapshot_every: int = key(500, "steps between averages kept for `sfumato ema`; 0 for none", least=0)
    timestep_sampling: str = key("uniform", "how training times are drawn", choices=DENSITIES)
    frame_timesteps: str = key(
        "shared",
        "clips: frames have one time, or times of their own (diffusion forcing)",
        choices=("shared", "independent"),
    )
    first_frame_share: float = key(0.0, "clips: share shown with their first frame given", least=0, most=1)
    last_frame_share: float = key(
        0.0, "clips: of those, share with their last frame given too", least=0, most=1
    )
    stratified_timesteps: bool = key(True, "spread the times of a batch evenly over their density")
    timestep_importance_sampling: bool = key(
        False, "draw times more often where losses are large and varied, and weigh them less"
    )
    loss: str = key(
        "",
        "file.py:name of a loss of your own, of (answer, target); empty: their squared difference",
        path=True,
    )
    guidance_told: float = key(
        0.0,
        "the guidance that a distilled network which hears it is told while it learns (FLUX dev, "
        "HunyuanVideo); 0: its pipeline's usual",
        least=0,
    )
    weighting: str = key("none", "weight of a sample's loss by its time", choices=WEIGHTINGS)
    precision: str = key(
        "auto",
        "auto, fp32, bf16, or fp16 for GPUs without bf16",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    weight_dtype: str = key(
        "fp32",
        "how trained weights are kept: fp32; bf16, rounded stochastically; bf16-masters, with fp32 copies",
        choices=("fp32", "bf16", "bf16-masters"),
    )
    sanity: bool = key(True, "run the sanity checks before the first step, in seconds")
    gradient_checkpointing: int = key(
        0, "every n-th block is computed again in the backward pass, to need less memory; 0: none", least=0
    )
    compile: bool = key(False, "compile the network's repeated blocks")
    deterministic: bool = key(False, "on a GPU: the same bits whenever a run is repeated, at some speed")
    offload: bool = key(
        False, "adapters on a GPU, with gradient_checkpointing = 1: frozen blocks wait in host memory"
    )
    device: str = key("auto", "auto, cpu, cuda, cuda:1, ...")
    threads: int = key(0, "CPU threads; 0 leaves the choice to torch", least=0)
    callbacks: tuple[str, ...] = key(
        (), "file.py:name of what is told of steps, pictures, measurements and checkpoints", path=True
    )
    log_every: int = key(10, "steps between loss records", least=1)
    save_every: int = key(500, "steps between checkpoints; the last step is always saved", least=1)
    keep_checkpoints: int = key(3, "newest checkpoints kept", least=1)
    keep_every: int = key(0, "checkpoints of every so many steps are kept as well; 0 for none", least=0)
    keep_best: bool = key(True, "the checkpoint with the lowest held-out loss is kept as well")
    save_async: bool = key(True, "write checkpoints beside the steps where memory allows a copy")
    patience: int = key(
        0, "stop after so many measurements without a lower held-out loss; 0 for never", least=0
    )
    validate_every: int = key(500, "steps between measurements of the held-out loss; 0 for never", least=0)
    trackers: tuple[str, ...] = key((), "who else hears of the curves: tensorboard, wandb, trackio")

    def expected_steps(self, seconds: float) -> int:
        """How many steps the run comes to where one takes so many seconds, as far as that says."""
        if not self.minutes:
            return self.steps
        return min(self.steps, max(1, self.min_steps, int(60 * self.minutes / max(seconds, 1e-9))))
