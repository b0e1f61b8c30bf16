"""The slim trainer: tasks, seed-stacked models, loop and run folders."""
