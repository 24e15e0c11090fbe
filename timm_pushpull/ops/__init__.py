"""The push-pull convolution: its equation (``reference``), faster versions, and which of them runs (``push_pull``)."""
