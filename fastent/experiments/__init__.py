"""The paper's experiments: plain functions over runs, their statistics, figures and report."""
