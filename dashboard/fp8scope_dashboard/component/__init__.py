"""The browser component."""
