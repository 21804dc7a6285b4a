"""The web service: a queue before the model, a JSON API, and a web page."""
