"""Data: random-access sources behind one interface, batched and positioned through Grain."""
