"""A one-shot LoRA supernet and the warm starts that it gives."""
