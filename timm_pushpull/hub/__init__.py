"""Publishes models with weights on the Hugging Face Hub: folders, cards, checks, uploads."""
