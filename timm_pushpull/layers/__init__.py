"""The push-pull layer, contrast normalization, the settings in a state dict, and the fused inference stem."""

import timm  # noqa: F401  (first: its import imports our networks, which must find no module here half imported)
