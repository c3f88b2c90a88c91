"""What is a run? Its directory, settings, checkpoints and records, each with typed readers and writers."""
