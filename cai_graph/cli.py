"""`cai`: parses, wires, prints; no logic of its own."""


def main() -> None:
    """Run the command line."""
