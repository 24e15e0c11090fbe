"""Figures of a push-pull unit."""
