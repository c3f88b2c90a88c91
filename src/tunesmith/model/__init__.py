"""What are the weights, and what can be done with them? Loading, GGUF, kernels and log-probabilities."""
