"""What does a newcomer see first? A real model, a real fine-tune and a report, in some minutes."""
