"""How does a model learn? From settings to a trained adapter in a run directory."""
