"""What a training needs around its step: loaders, checks, warnings, observations, checkpoints."""
