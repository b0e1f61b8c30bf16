"""Property suite: what must hold of every activation matrix, on every backend."""
