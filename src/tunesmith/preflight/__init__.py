"""Will it work here, and what will it cost? The doctor and the plan, before anything is trained."""
