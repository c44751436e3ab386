"""Text generation: `text.generate` on the model chunks of an open session, `checkpoint.run` on a checkpoint.

Chat templates are not applied: a prompt is plain text that the model continues.
"""
