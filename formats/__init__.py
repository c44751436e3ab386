"""Move named regions of tensors between memory and files. Knows no models."""

DISTRIBUTION = "mbtools"
