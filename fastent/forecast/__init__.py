"""From the entropies of a run to its forecast and diagnosis; stands on the records, and draws with `fastent.plots`."""
