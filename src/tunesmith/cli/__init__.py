"""What can be typed? One file for a group of verbs; each verb calls the Python function of its name."""

from tunesmith.cli.app import main

__all__ = ["main"]
