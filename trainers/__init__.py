"""Offline training from the logs that cai_graph writes."""
