"""First contact with a GPU: one prepared call that tells all that a short loan of a machine can tell."""
