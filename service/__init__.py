"""Drawing for many people at once: a queue before the model, a JSON API, and a web page."""
