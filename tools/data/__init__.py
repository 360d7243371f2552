"""Training examples: batch asks for them, public_data fetches them, clean and mine make them better."""
