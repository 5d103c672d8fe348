"""MindVL and Qwen2.5-VL."""
