"""Semi-supervised learning for nnU-Net v2."""
