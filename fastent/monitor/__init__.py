"""The monitor: records, probe, isolation of its pass, deferred evaluation, CUDA; imports the library and no study."""
