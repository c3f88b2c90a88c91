"""What does a model answer, and how likely is a text to it? Generation and scoring, without HTTP and without
runs."""
