"""Which ids does the model meet, and which of them are learned? Examples become ids, targets and
micro-batches."""
