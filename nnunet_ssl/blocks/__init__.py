"""What a method is made of: pure functions of tensors and networks."""
