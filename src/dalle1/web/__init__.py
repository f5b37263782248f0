"""The web page on which a model is tried (`dalle1.app`)."""
