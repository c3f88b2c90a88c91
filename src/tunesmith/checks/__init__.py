"""What can be said of one text? Facts used by the audit, by tasks and by guardrails."""
