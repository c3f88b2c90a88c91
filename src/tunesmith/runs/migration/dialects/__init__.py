"""Programs whose settings are read: one file a program."""
