"""Evaluation: hub fetches test sets, passkey makes its own, mteb_adapter and mteb_results speak with
MTEB."""
