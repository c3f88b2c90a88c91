"""What is in the files? Files become examples; formats are detected, calls are read."""
