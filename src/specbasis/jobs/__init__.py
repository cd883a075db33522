"""How work runs and is kept."""
