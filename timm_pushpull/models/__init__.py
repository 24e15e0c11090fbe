"""The networks and their registration, the conversion of other timm models, checkpoints of the original code."""

import timm  # noqa: F401  (imported first: it imports our networks, which must not meet a half-imported module)
