"""Where preference pairs come from: one module a source, and what the sources share."""
