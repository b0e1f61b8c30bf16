"""From the entropies of a run to its forecast and diagnosis; imports `fastent.records` and nothing else of fastent."""
