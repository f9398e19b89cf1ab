"""Constitutional AI for any LLM application."""
