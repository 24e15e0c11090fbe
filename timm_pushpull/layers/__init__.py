"""The push-pull layer, the contrast normalization before it, and the stem of a network in one piece of work."""
