"""Automatic circuit discovery for transformer language models."""
