"""Folders and files of a dataset, and the loaders that read them."""
