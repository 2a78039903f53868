"""One file, one paper, one nnU-Net trainer."""
