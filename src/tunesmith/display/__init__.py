"""How is anything shown to a person? The terminal, pages, charts and words. Knows no domain type."""
