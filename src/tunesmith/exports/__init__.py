"""How does a tuned model reach other programs, and does it still say the same? Kinds of artefacts, one file
each under `kinds`, and the gate that reloads every artefact in a fresh process and compares it with the live
adapter."""
