"""Replays agents (many turns over a growing context) against a cluster or any OpenAI server and measures them."""
