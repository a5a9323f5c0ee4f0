"""The door: strangers' files become this package's model or are refused in one line, and a model becomes such files.
Nothing of the model imports it, and nothing behind it checks a file."""
