"""What a classifier classifies."""

Text = str | tuple[str, str]
"""A text, or a sentence pair."""
