"""What does the model do before and after, and how sure is that? Tasks, statistics and records."""
