"""Training of preference models: what writes the artifacts that `app` serves. `app` never imports this package."""
