"""Peak training memory, counted on fake tensors."""
