"""The FP8 libraries that the agent reads from, a module each."""
