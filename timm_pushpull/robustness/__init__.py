"""Errors of models on clean and corrupted images: measured, stored, summed up, reported."""
