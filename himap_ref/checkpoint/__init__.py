"""The door: strangers' files become this package's model, or are refused in one line.
Nothing of the model imports it, and nothing behind it checks a file."""
