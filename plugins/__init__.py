"""The features, each a plugin."""
