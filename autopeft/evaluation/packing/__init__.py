"""Several candidates trained in one pass over the backbone."""
