"""What a rank imports, before it is forked."""

import warnings

warnings.simplefilter("ignore")

import torch  # noqa: E402

import trainer.loop  # noqa: E402, F401

torch.set_num_threads(1)
