"""Which settings hold, and where did each come from? Layers of presets, files, environment and options,
strict."""
