"""The networks and their registration, the conversion of other timm models, checkpoints of the original code."""
