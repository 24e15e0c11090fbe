"""The push-pull layer, contrast normalization, the settings in a state dict, and the fused inference stem."""
