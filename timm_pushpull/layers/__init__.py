"""The push-pull layer, contrast normalization, the settings in a state dict, and the fused inference stem."""

import timm  # noqa: F401  (imported first: it imports our networks, which must not meet a half-imported module)
