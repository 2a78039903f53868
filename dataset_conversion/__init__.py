"""Converters from public data sets to nnU-Net raw folders."""
