"""How rows are laid out: one file a layout."""
