"""Training from the logs that cai_graph writes: datasets, training stages and evaluation."""
