"""Every test runs on one thread, offline, with tensor shapes checked on each call."""

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from jaxtyping import install_import_hook

install_import_hook("sfumato.theory", "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(1)
