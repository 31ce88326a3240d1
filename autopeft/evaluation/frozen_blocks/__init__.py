"""Hidden states below the lowest adapter, computed once and kept on disk."""
