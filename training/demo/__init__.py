"""The bundled demo model: drawn cartoons, a caption language, and a tiny Qwen2.5-VL trained on both."""
