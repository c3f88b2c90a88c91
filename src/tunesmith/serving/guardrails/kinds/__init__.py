"""One file for each guardrail, or for a few that share what they look at."""
