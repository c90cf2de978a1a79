"""The web page: `dragdiff ui`."""
