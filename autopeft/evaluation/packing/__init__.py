"""Packed training: several LoRA trials in one pass over the resident backbone."""
