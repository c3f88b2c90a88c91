"""What is wrong with the rows? One rule a file: what it looks at, what it finds, and its bar."""
