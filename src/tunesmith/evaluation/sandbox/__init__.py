"""How is code that a model wrote run without harm? A confined process without network or writable files."""
