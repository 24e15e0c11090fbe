"""PRIME, and its place inside a network in training."""
