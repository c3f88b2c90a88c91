"""What is minimised, and by what? Objectives and the optimizer."""
