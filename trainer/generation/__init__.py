"""Text from a model: `text.generate` works on the chunks of an open session, `checkpoint.run` on a checkpoint.

Knows nothing of chat templates: a prompt is text, and goes on as it stands.
"""
