"""Routes in the JSON of other systems, over the one way of scoring."""
