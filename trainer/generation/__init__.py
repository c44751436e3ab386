"""Text from a model: `generate` works on the chunks of an open session, `trainer.generation.command` on a checkpoint.

Knows nothing of chat templates: a prompt is text, and goes on as it stands.
"""

from trainer.generation.sampling import Sampling
from trainer.generation.text import Generation, generate

__all__ = ["Generation", "Sampling", "generate"]
