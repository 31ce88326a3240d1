"""Adapter folders: written, verified, loaded again."""
