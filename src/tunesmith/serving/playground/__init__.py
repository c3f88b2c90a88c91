"""One page to talk with what is served, two models side by side, and to vote."""
