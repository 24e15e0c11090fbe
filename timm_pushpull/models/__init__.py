"""The networks and their registration, the conversion of other timm models, checkpoints of the original code."""

import timm  # noqa: F401  (first: its import imports our networks, which must find no module here half imported)
